"""Every call of a bench, written down as it ends, so that a bench that is cut goes on behind it. No torch."""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

#: Of `report.environment`: what calls must share that are compared with each other.
SAME = ("commit", "torch", "cuda", "transformers")


class Calls:
    """``OUT.calls.jsonl``: a line that says what is measured on what, and a line for each call.

    Args:
        out: of the bench; None keeps nothing. settings: what an earlier run must have had in common with this one.
        resume: go on behind an earlier run; one of other settings, or none, begins anew.

    Attributes:
        found: how many calls of an earlier run count. other: settings in which that run differed, whose calls do not.
    """

    def __init__(self, out: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = out and out.with_name(f"{out.name}.calls.jsonl")
        self._found: dict[str, dict[tuple[str, int], tuple[float, Any]]] = {}
        self.other: list[str] = []
        if self.path is None:
            return
        settings = json.loads(json.dumps(settings, default=str))
        first, *lines = list(_lines(self.path)) if resume else [{}]
        before = first.get("settings", settings)
        self.other = [name for name in settings if before.get(name) != settings[name]]
        if "settings" not in first or self.other:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"settings": settings}), encoding="utf-8")
            return
        for line in lines:
            kept = self._found.setdefault(line["cell"], {})
            kept[line["call"], line["round"]] = line["seconds"], line["result"]

    @property
    def found(self) -> int:
        """Calls that an earlier run left."""
        return sum(map(len, self._found.values()))

    def cell(self, name: str, read: Callable[[Any], T]) -> MutableMapping[tuple[str, int], tuple[float, T]]:
        """What `interleave` keeps of one of its series; ``read`` makes a result of its JSON."""
        known = self._found.get(name, {})
        return _Cell({call: (seconds, read(result)) for call, (seconds, result) in known.items()}, self.path, name)


class _Cell(dict[tuple[str, int], tuple[float, T]]):
    """Writes what is added."""

    def __init__(self, known: Mapping[tuple[str, int], tuple[float, T]], path: Path | None, name: str) -> None:
        super().__init__(known)
        self._path, self._name = path, name

    def __setitem__(self, call: tuple[str, int], value: tuple[float, T]) -> None:
        super().__setitem__(call, value)
        if self._path is None:
            return
        seconds, result = value
        plain: Any = dataclasses.asdict(result) if dataclasses.is_dataclass(result) else result  # type: ignore[arg-type]
        line = {"cell": self._name, "call": call[0], "round": call[1], "seconds": round(seconds, 3), "result": plain}
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line))  # begins the line: the one before may have been cut short


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The first is empty where the file is missing, or began with something else."""
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for text in texts:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    yield from found or [{}]


def opened(options: Namespace, before: Mapping[str, Any]) -> Calls:
    """The calls of a bench, and a word on the terminal of what an earlier run left.

    Args:
        options: of the bench. before: what `report.environment` gave.
    """
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "resume", "note")}
    where = [(before["gpu"] or {}).get("name")] if before["gpu"] else [before["processor"], before["threads"]]
    settings = {**asked, "measured on": where, **{name: before[name] for name in SAME}}
    calls = Calls(options.out, settings, resume=options.resume)
    if calls.other:
        sys.stdout.write(f"begins anew: of the calls in {calls.path} other than now are {', '.join(calls.other)}\n")
    elif calls.found:
        sys.stdout.write(f"goes on behind {calls.found} calls in {calls.path}\n")
    return calls
