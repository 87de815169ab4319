"""Which source files make a cell's answers and verdicts, and a hash of them that comments do not change. No torch.

They are the core (`CORE` and what it imports) and what the method's and the family's own modules import, wherever the
import stands. So another method, another family, a report or a comment costs no finished cell, and a change of the
cell's own method does.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ivcp_eval import files
from ivcp_eval.interface.registry import WRAPPERS, unwrapped_name

ROOT = files.PACKAGE.parent

#: Where answers and verdicts are made: a loaded model, how samples are put together, prompts, evaluation, the judge.
CORE = (
    "ivcp_eval.runs.answering.session",
    "ivcp_eval.runs.answering.samples",
    "ivcp_eval.vlmeval_bridge.evaluate",
)
#: In place of the first two, where a server answers.
SERVED_CORE = ("ivcp_eval.runs.answering.served.samples", "ivcp_eval.vlmeval_bridge.evaluate")
#: Modules and packages that are imported there but change no answer, with the reason. Nothing behind them is followed.
OUTSIDE: Mapping[str, str] = {
    "ivcp_eval": "names of the public interface",
    "ivcp_eval.files": "how files are written",
    "ivcp_eval.interface.failures": "what counts as a failed answer, which is made again",
    "ivcp_eval.interface.records.drawing": "pictures for people",
    "ivcp_eval.interface.models": "where weights are; the identity has their revision",
    "ivcp_eval.interface.registry": "names; the identity has the parameters it sets",
    "ivcp_eval.interface.variants": "what is part of the identity",
    "ivcp_eval.benchmarks": "declarations; the identity has the wording, the data and how it is scored",
    "ivcp_eval.benchmarks.refcoco.partial": "what a converter reports",
    "ivcp_eval.engine.cost": "costs, made again from what the answers note",
    "ivcp_eval.runs.answering.timing": "times, measured apart from answering",
    "ivcp_eval.runs.planning": "what is to be answered",
    "ivcp_eval.runs.store": "how answers are stored",
    "ivcp_eval.vlmeval_bridge.cpu_torchvision": "an import that fails otherwise",
    "ivcp_eval.vlmeval_bridge.judge.cache": "how verdicts are stored",
    "ivcp_eval.vlmeval_bridge.judge.config": "the judge's name, which is part of the identity",
    "ivcp_eval.vlmeval_bridge.judge.estimate": "what a judge will cost",
}
_WHOLE = ("ivcp_eval.engine.cost", "ivcp_eval.runs.planning", "ivcp_eval.runs.store")  # of the others the file alone
_PACKAGES = ("ivcp_eval", "model_adapters")


@dataclass(frozen=True)
class Code:
    """The source files behind an answer.

    Attributes:
        files: path from the root, with "/" -> digest of its syntax.
    """

    files: Mapping[str, str]

    @property
    def hash(self) -> str:
        """12 hexadecimal digits."""
        text = "\n".join(f"{path} {digest}" for path, digest in sorted(self.files.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def code_of(method: str, family: str, root: Path = ROOT, served: bool = False) -> Code:
    """The code that answers with a method (in a wrapper the wrapper's too) on a family, or that asks a server.

    A plug-in's method is not under ``root``: the identity holds its package, version and code apart.
    """
    base, plus = unwrapped_name(method)
    modules = [*(SERVED_CORE if served else CORE), f"ivcp_eval.methods.{base}", f"model_adapters.{family}"]
    modules += [WRAPPERS[plus][0]] if plus else []
    tree = _tree(root)
    paths = sorted(frozenset().union(*map(tree.reached, modules)))
    return Code({path: tree.digests[path] for path in paths})


@cache
def _tree(root: Path) -> _Tree:
    return _Tree(root)


class _Tree:
    """The packages under a root. Every file is read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.digests: dict[str, str] = {}
        self._imported: dict[str, list[str]] = {}
        self._reached: dict[str, frozenset[str]] = {}
        self._paths: dict[str, str | None] = {}

    def reached(self, name: str) -> frozenset[str]:
        """Paths of a module and of everything that it imports, packages on the way included."""
        if name not in self._reached:
            reached: set[str] = set()
            waiting = self._files([name])
            while waiting:
                path = waiting.pop()
                if path not in reached:
                    reached.add(path)
                    waiting += self._read(path)
            self._reached[name] = frozenset(reached)
        return self._reached[name]

    def _read(self, path: str) -> list[str]:
        """The files that one file imports; its digest is noted."""
        if path not in self._imported:
            module = ast.parse((self.root / path).read_bytes(), path)
            self.digests[path] = syntax_digest(module)
            package = path.rpartition("/")[0].replace("/", ".")
            self._imported[path] = self._files(set(_imports(module, package)))
        return self._imported[path]

    def _files(self, names: Iterable[str]) -> list[str]:
        around = {part for name in names for part in _with_packages(name)}
        return [path for path in map(self._path, sorted(around)) if path is not None]

    def _path(self, name: str) -> str | None:
        """The file of a module that counts; None for other packages, names inside a module, and what is outside."""
        if name not in self._paths:
            stem = name.replace(".", "/")
            there = (path for path in (f"{stem}.py", f"{stem}/__init__.py") if (self.root / path).is_file())
            self._paths[name] = None if _outside(name) else next(there, None)
        return self._paths[name]


def _with_packages(name: str) -> Iterator[str]:
    """A module's name and those of the packages around it, whose files run first."""
    parts = name.split(".")
    if parts[0] in _PACKAGES:
        yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _outside(name: str) -> bool:
    return name in OUTSIDE or name.startswith(tuple(f"{package}." for package in _WHOLE))


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Everything that may be a module, function-level imports included, those for type checkers not."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _only_for_types(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*around, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.stmt | ast.Module | ast.excepthandler | ast.match_case):
            waiting += (child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))


def _only_for_types(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


# -- a digest of the syntax --------------------------------------------------------------------------------------------


def syntax_digest(tree: ast.Module) -> str:
    """16 hexadecimal digits of what a module does: no comments, docstrings, layout or line numbers.

    Written here, since `ast.dump` differs between versions of Python: fields that are empty are left out, as are those
    that follow from the rest (load or store, the ``u`` of ``u""``), and adjacent texts of an f-string are joined.
    """
    parts: list[str] = []
    _write(tree, parts)
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


_DERIVED = ("ctx", "kind", "type_comment", "type_ignores")


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in kind._fields if name not in _DERIVED)


def _write(node: Any, parts: list[str]) -> None:
    """Append one node as text; `ascii` has no version of Unicode's tables, unlike `repr`."""
    kind: Any = type(node)
    parts.append(kind.__name__ + "(")
    if kind is ast.Constant:
        parts.append(ascii(node.value))
    else:
        for name in _fields(kind):
            value = getattr(node, name, None)
            if isinstance(value, list):
                _write_list(value, parts, name, joined=kind is ast.JoinedStr)
            elif isinstance(value, ast.AST):
                parts.append(name + "=")
                _write(value, parts)
            elif value is not None:
                parts.append(f"{name}={value!a},")
    parts.append(")")


def _write_list(values: list[ast.AST | str | None], parts: list[str], name: str, joined: bool) -> None:
    kept = [value for value in values if not _is_bare_text(value)]
    if joined:
        kept = list(_joined(kept))
    if not kept:
        return
    parts.append(name + "=[")
    for value in kept:
        if isinstance(value, ast.AST):
            _write(value, parts)
        else:
            parts.append(f"{value!a},")
    parts.append("]")


def _is_bare_text(node: object) -> bool:
    """A docstring, of whatever it stands under: a text that nothing is done with."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _joined(values: Iterable[ast.AST | str | None]) -> Iterator[ast.AST | str | None]:
    """The parts of an f-string, adjacent texts as one and empty ones left out."""
    text = ""
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            text += value.value
            continue
        if text:
            yield ast.Constant(text)
        text = ""
        yield value
    if text:
        yield ast.Constant(text)
