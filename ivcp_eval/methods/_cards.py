"""What the files of methods say about themselves, read without importing them, and which systems could be run."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ivcp_eval.files import PACKAGE
from ivcp_eval.interface import plugins
from ivcp_eval.interface.registry import WRAPPERS, module_names, unwrapped_name

FILE = Path(__file__).with_name("_catalogue.yaml")
STARTED_FROM = Path(__file__).with_name("_started_from.yaml")
STATES = ("gaps", "weights", "model", "tool")

LABELS = {
    "faithful": "held to the authors' own code",
    "from_formula": "transcribed from the paper, whose authors published no code",
    "variant": "gaps filled by us, each named",
    "control": "what any method has to beat",
}
_FIELDS = ("Paper", "Reference", "Differs")
TOOLS = {  # verbs that do a tool's work, or make a model
    "LLaVA-UHD v4": "`ivcp lab train uhd_v4`, `--model uhd_v4`",
    "POINTS-Long": "`ivcp lab train points_long`, `--model points_long_standby`",
    "VisPCO": "`ivcp lab train vispco`, `ivcp tune`",
    "Counterfactual prompting": "`ivcp analyse flips`",
}
WRAPPED = "NAME"  # in place of the method's name, before a wrapper's


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
        fields = {label.lower(): _labelled(text, label) for label in _FIELDS}
        keeps = " ".join(text.split("\n\n", 1)[0].split())
        label = next(iter(_faithfulness(tree)), "")
        return cls(name, keeps.split("\nPaper:")[0], faithfulness=label, **fields)


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
    folder = PACKAGE / "methods"
    cards = []
    for name in module_names("ivcp_eval.methods"):
        package = folder / name / "__init__.py"
        cards.append(MethodCard.read(package if package.exists() else folder / f"{name}.py", name))
    cards.sort(key=lambda card: (card.faithfulness == "control", card.name))
    for plus, (module, _) in WRAPPERS.items():
        cards.append(MethodCard.read(folder / f"{module.rpartition('.')[2]}.py", WRAPPED + plus))
    return cards


def control_names() -> list[str]:
    """The controls in this package but the baseline itself: what any method is to be compared with."""
    return [card.name for card in method_cards() if card.faithfulness == "control" and card.name != "none"]


def method_table() -> str:
    """The table of all methods in docs/methods.md, in Markdown."""
    lines = ["| method | what it keeps | paper | faithfulness |", "| --- | --- | --- | --- |"]
    for card in map(_escaped, method_cards()):
        lines.append(f"| `{card.name}` | {card.keeps} | {_link(card.paper)} | {card.faithfulness} |")
    return "\n".join(lines)


def method_summary() -> str:
    """The README's table: the names of the methods by faithfulness, in Markdown."""
    lines = ["| faithfulness | methods |", "| --- | --- |"]
    for label, meaning in LABELS.items():
        names = [f"`{card.name}`" for card in method_cards() if card.faithfulness == label]
        lines += [f"| {label}: {meaning} | {', '.join(names)} |"] if names else []
    return "\n".join(lines)


def started_from_table() -> str:
    """The table of docs/systems.md, in Markdown: each system that this work started from, how far it is, what is left.

    What runs, as what, and how it differs are read from the catalogue and the methods' docstrings.

    Raises:
        ValueError: a system that the catalogue has not, or has more than once.
    """
    import yaml

    loaded: dict[str, str | None] = yaml.safe_load(STARTED_FROM.read_text(encoding="utf-8"))
    known = {card.name: card for card in method_cards()}
    lines = [
        "| system | here | form | how far from the published one | what would close the rest |",
        "| --- " * 5 + "|",
    ]
    for system, rest in loaded.items():
        entries = [entry for entry in systems() if entry["system"] == system]
        if len(entries) != 1:
            raise ValueError(f"{STARTED_FROM.name}: {len(entries)} entries of {FILE.name} are called {system!r}")
        (entry,) = entries
        if not rest and "needs" not in entry:
            raise ValueError(f"{STARTED_FROM.name}: {system!r} runs by now; say what would close the rest")
        if "method" in entry:
            base, plus = unwrapped_name(entry["method"])
            card = known[WRAPPED + plus if plus else base]
            here, form, far = f"`{card.name}`", card.faithfulness, card.differs or entry.get("note", "")
        else:
            here, form, far = TOOLS.get(system, "no"), entry["state"], _sentence(entry["why"])
        paper = f"[{system}](https://arxiv.org/abs/{entry['paper']})" if entry["paper"] else system
        cells = (paper, here, form, far, rest or _sentence(entry["needs"]))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _escaped(card: MethodCard) -> MethodCard:
    return dataclasses.replace(card, keeps=card.keeps.replace("|", "\\|"))


def _link(paper: str) -> str:
    match = re.search(r"https?://\S+", paper)
    if not match:
        return ""
    url = match.group().rstrip(".,;)")
    return f"[{url.rsplit('/', 1)[-1]}]({url})"


# -- the catalogue of systems, `ivcp list --methods` -----------------------------------------------------------------


@cache
def systems() -> tuple[dict[str, str], ...]:
    """The entries of ``catalogue.yaml``.

    Raises:
        ValueError: an entry that is neither runnable nor says what it needs.
    """
    import yaml

    loaded: list[dict[str, Any]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    for entry in loaded:
        allowed = (
            {"system", "paper", "method", "note"} if "method" in entry else {"system", "paper", "state", "why", "needs"}
        )
        if set(entry) - allowed or not allowed - {"note"} <= set(entry):
            raise ValueError(
                f"{FILE.name}: entry {entry.get('system')!r} has {sorted(entry)}, expected {sorted(allowed)}"
            )
        if entry.get("state", STATES[0]) not in STATES:
            raise ValueError(
                f"{FILE.name}: state {entry['state']!r} of {entry['system']!r} is none of {', '.join(STATES)}"
            )
    return tuple({key: str(value) for key, value in entry.items()} for entry in loaded)


def rows() -> list[dict[str, str]]:
    """One row per system: ``method or system``, ``use``, ``note``; what runs now first, by the name users type.

    ``use`` is the faithfulness label of a method that runs, "plug-in" or "refused" for an installed package's, else the
    state.
    """
    titles = {entry["method"]: entry for entry in systems() if "method" in entry}
    cards = {card.name: card for card in method_cards()}
    table = []
    for name, card in cards.items():
        entry = titles.get(name.replace(WRAPPED, "fastv"), {})
        system = entry.get("system", "")
        runs = "" if _squeezed(system) == _squeezed(name) else f"({system})"
        note = " ".join(part for part in (card.keeps, runs if system else "", entry.get("note", "")) if part)
        table.append(_row(name, card.faithfulness, note))
    for plugin in plugins.found():
        table.append(_row(plugin.name, "refused" if plugin.problem else "plug-in", _plugin_note(plugin)))
    for entry in systems():
        if "state" in entry:
            paper = f" (arXiv {entry['paper']})" if entry["paper"] else ""
            table.append(_row(entry["system"] + paper, entry["state"], f"{entry['why']}. Needs: {entry['needs']}."))
    return table


def _squeezed(name: str) -> str:
    """Letters and digits alone: LOOK-M is `lookm`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _plugin_note(plugin: plugins.Plugin) -> str:
    return f"from {plugin.package}" + (f"; cannot be used: {plugin.problem}" if plugin.problem else "")


def _row(name: str, use: str, note: str) -> dict[str, str]:
    return {"method or system": name, "use": use, "note": note}
