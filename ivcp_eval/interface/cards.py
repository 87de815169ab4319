"""What the files of methods say about themselves, read without importing them: for tables and listings."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ivcp_eval.registry import PLUS_IVC, module_names

_FIELDS = ("Paper", "Reference", "Differs")
WRAPPERS = {"_plus_ivc": "NAME" + PLUS_IVC}  # file of a wrapper -> how users write it


@dataclass(frozen=True)
class MethodCard:
    """The docstring of a method's file in its fixed form.

    Attributes:
        name: registered name. keeps: the first sentence.
        paper, reference, differs: what follows these labels, up to the end of the paragraph; empty if absent.
        faithfulness: the label that reaches the CSV.
    """

    name: str
    keeps: str
    paper: str = ""
    reference: str = ""
    differs: str = ""
    faithfulness: str = ""

    @classmethod
    def read(cls, path: Path, name: str) -> MethodCard:
        """The card of one file.

        Raises:
            ValueError: no docstring.
        """
        tree = ast.parse(path.read_text(encoding="utf-8"))
        text = ast.get_docstring(tree)
        if not text:
            raise ValueError(f"{path.name} has no docstring; it must begin with one sentence on what the method keeps")
        found = {label.lower(): _labelled(text, label) for label in _FIELDS}
        keeps = " ".join(text.split("\n\n", 1)[0].split())
        label = next(iter(_faithfulness(tree)), "")
        return cls(name, keeps.split("\nPaper:")[0], faithfulness=label, **found)


def _labelled(text: str, label: str) -> str:
    others = "|".join(_FIELDS)
    match = re.search(rf"^{label}: (.*?)(?=\n\n|\n(?:{others}): |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return " ".join(match.group(1).split()) if match else ""


def _faithfulness(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "faithfulness":
            assert isinstance(node.value, ast.Constant)
            yield str(node.value.value)


def method_cards() -> list[MethodCard]:
    """Every method in this package, controls last, then the wrappers."""
    folder = Path(__file__).parent / "methods"
    cards = []
    for name in module_names("ivcp_eval.methods"):
        package = folder / name / "__init__.py"
        cards.append(MethodCard.read(package if package.exists() else folder / f"{name}.py", name))
    cards.sort(key=lambda card: (card.faithfulness == "control", card.name))
    return cards + [MethodCard.read(folder / f"{file}.py", name) for file, name in WRAPPERS.items()]


def control_names() -> list[str]:
    """The controls that prune, in this package: what any method is to be compared with."""
    return [card.name for card in method_cards() if card.faithfulness == "control" and card.name != "none"]


def method_table() -> str:
    """The README's table of methods, in Markdown."""
    lines = ["| method | what it keeps | paper | faithfulness |", "| --- | --- | --- | --- |"]
    for card in map(_escaped, method_cards()):
        lines.append(f"| `{card.name}` | {card.keeps} | {_link(card.paper)} | {card.faithfulness} |")
    return "\n".join(lines)


def _escaped(card: MethodCard) -> MethodCard:
    return dataclasses.replace(card, keeps=card.keeps.replace("|", "\\|"))


def _link(paper: str) -> str:
    match = re.search(r"https?://\S+", paper)
    if not match:
        return ""
    url = match.group().rstrip(".,;)")
    return f"[{url.rsplit('/', 1)[-1]}]({url})"
