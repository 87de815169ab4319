"""Cells that were answered before and do not count any more, and what changed since. Reads files alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ivcp_eval.files import DamagedError, read_json
from ivcp_eval.runs.planning.cells import Cell, code_listing

#: What a user asks for; a cell that differs in one of these is another question, not an older answer to this one.
_REQUESTED = ("variant", "benchmark", "limit", "judge", "limits", "placement")
_MOST = 3  # names that are spelled out in one line


def uncounted(cell: Cell) -> list[tuple[Path, str]]:
    """Folders with answers to the same question as an unfinished cell's, and why they are not counted.

    One that nobody can say this of (its notes are missing or of another version) is left out.
    """
    parent = cell.folder.parent
    if not parent.is_dir() or cell.finished() is not None:
        return []
    mine: dict[str, Any] = json.loads(cell.identity.canonical)
    lines = []
    for folder in sorted(parent.glob(f"{cell.label}-*")):
        if folder == cell.folder or not _answered(folder):
            continue
        other = _identity(folder)
        if other is not None and all(other.get(name) == mine[name] for name in _REQUESTED):
            lines.append((folder, "; ".join(_changes(cell, other, mine))))
    return lines


def uncounted_lines(cells: Iterable[Cell]) -> list[str]:
    """A line for each model and reason: how many cells of which methods."""
    groups: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for _, why in uncounted(cell):
            groups.setdefault((cell.identity.variant.model, why), []).append(cell.identity.variant.method)
    return [
        f"{len(methods)} answered cells of {_some(dict.fromkeys(methods))} on {model} are not counted: {why}"
        for (model, why), methods in groups.items()
    ]


def _answered(folder: Path) -> bool:
    journals = [folder / "journal.jsonl", *folder.glob("shards/*.jsonl")]
    return any(path.is_file() and path.stat().st_size for path in journals)


def _identity(folder: Path) -> dict[str, Any] | None:
    """As the cell noted it; cells of an earlier version have it in their record only."""
    for name in ("cell.json", "run.json"):
        with suppress(FileNotFoundError, DamagedError):
            identity = read_json(folder / name, "").get("identity")
            if isinstance(identity, dict) and isinstance(identity.get("versions"), dict):
                return identity
    return None


def _changes(cell: Cell, other: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    if other.get("code") != mine["code"]:
        before = _listing(code_listing(cell.runs, str(other.get("code"))))
        if before is None:
            yield "they were made by a version that did not note its files"
            return
        yield _code_changes(before, cell.code)
    for name in sorted((mine.keys() | other.keys()) - {*_REQUESTED, "code"}):
        if name == "versions":
            yield from _version_changes(other[name], mine[name])
        elif other.get(name) != mine.get(name):
            yield f"{name} changed"


def _version_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield f"{name} was {before.get(name, 'not noted')}, is {now.get(name, 'not noted')}"


def _code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    changed = sorted(path for path in before.keys() & now.keys() if before[path] != now[path])
    gone, new = sorted(before.keys() - now.keys()), sorted(now.keys() - before.keys())
    said = [(changed, "changed"), (gone, "no longer used"), (new, "new")]
    return "; ".join(f"{_some(paths)} {word}" for paths, word in said if paths)


@cache
def _listing(path: Path) -> Mapping[str, str] | None:
    """What a code hash covered; the file never changes once it is there."""
    with suppress(FileNotFoundError, DamagedError):
        return read_json(path, "")
    return None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _MOST
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:_MOST])} and {more} more"
