"""How far a sweep is, from the files of all its workers, wherever they run: reads only what was appended since."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ivcp_eval.files import DamagedError
from ivcp_eval.interface.variants import BASELINE, SEPARATOR
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.placement import Placement
from ivcp_eval.runs.planning.plan import RunPlan, Unit
from ivcp_eval.runs.progress.tally import CellState, State, Tally
from ivcp_eval.runs.records.state import Mark, lease, mark, shard
from ivcp_eval.runs.store.journal import entry
from ivcp_eval.runs.store.lease import held

_STATES: dict[str, State] = {"ok": "scored", "skipped": "skipped"}
WINDOW_S = 120.0  # over which speed is measured ...
WINDOW_SAMPLES = 10  # ... unless fewer samples than these fall into it


class _Tail:
    """The whole lines that were appended to a journal since the last look."""

    def __init__(self, path: Path, cell: Cell) -> None:
        self.path, self.cell = path, cell
        self.offset = 0
        self.good: set[str] = set()
        self.bad: dict[str, str] = {}  # key of a sample -> its error

    def read(self, tally: Tally) -> bool:
        """Take in what is new; False if there is no such file."""
        try:
            with self.path.open("rb") as stream:
                if stream.seek(0, 2) < self.offset:
                    self.offset = 0  # a broken end was cut off; keys are not counted twice
                stream.seek(self.offset)
                new = stream.read()
        except FileNotFoundError:
            return False
        whole = new[: new.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.split(b"\n")[:-1]:
            try:
                self._take(line, tally)
            except ValueError:
                continue  # who scores the cell says what is wrong with it
        return True

    def _take(self, line: bytes, tally: Tally) -> None:
        key, answer = entry(line)
        if self.cell.needs_answer(answer):
            self.bad |= {key: answer.error} if answer.error else {}
            return
        if key not in self.good and self.cell.identity.variant.method != BASELINE:
            tally.visual_tokens += answer.visual_tokens or 0
            tally.visual_kept += answer.visual_kept or 0
        self.good.add(key)
        self.bad.pop(key, None)


@dataclass
class _Followed:
    """A unit: its journals while it is open, and what it adds to its benchmark's tally.

    Attributes:
        errors: by the hash of a cell the last error of a sample, kept when the unit is done.
    """

    unit: Unit
    tails: list[_Tail]
    done: bool = False
    marked: bool = False
    answered: int = 0
    failed: int = 0
    fresh: int = 0
    seen: bool = False
    working: bool = False
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.unit.stop - self.unit.start


@dataclass
class Watch:
    """Follows a sweep's files; `look` brings `tallies` up to date.

    Attributes:
        plan: the sweep. clock: seconds, monotonic.
    """

    plan: RunPlan
    clock: Callable[[], float] = time.monotonic
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    _units: list[_Followed] = field(default_factory=list)
    _fresh: int = 0
    _speeds: deque[tuple[float, int]] = field(default_factory=deque)
    _recount: set[tuple[str, str]] = field(default_factory=set)
    _records: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for _, benchmark, cell in self.plan.cells():
            model = cell.identity.variant.model
            self.tallies.setdefault((model, benchmark.name), Tally(model, benchmark.name)).cells += 1
        for unit in self.plan.units():
            followed = _Followed(unit, _tails(unit), done=not unit.pending)
            self._units.append(followed)
            tally = self._of(followed)
            tally.samples += followed.size
            tally.units += 1
            if followed.done:  # whole before, by this run or another
                self._take_mark(followed, tally)
        self._recount = set(self.tallies)
        self.refresh()
        self._fresh = 0  # what was there before is no speed
        self._speeds = deque([(self.clock(), 0)])

    def refresh(self) -> None:
        """Read what is new, after the first time only in units that a live worker holds or has just finished."""
        done = _names(self.plan.state / "done", ".json")
        leased = _names(self.plan.state / "leases", ".lease")
        for tally in self.tallies.values():
            tally.answered = tally.failed = tally.working = 0
        for followed in self._units:
            self._follow(followed, done, leased)
            tally = self._of(followed)
            tally.answered += followed.answered
            tally.failed += followed.failed
        self._count_scored()
        if not self._speeds or self._fresh != self._speeds[-1][1] or self.total.answered < self.total.samples:
            self._speeds.append((self.clock(), self._fresh))  # while the last cells are scored, speed stands
        while self._speeds[-1][1] == 0 and len(self._speeds) > 1:
            self._speeds.popleft()  # loading a model is no speed either
        while (
            len(self._speeds) > 2
            and self._speeds[-1][0] - self._speeds[1][0] > WINDOW_S
            and self._speeds[-1][1] - self._speeds[1][1] >= WINDOW_SAMPLES
        ):
            self._speeds.popleft()

    @property
    def total(self) -> Tally:
        """The sum over all benchmarks."""
        numbers = [name for name, value in vars(Tally()).items() if isinstance(value, int | float)]
        return Tally(**{name: sum(getattr(tally, name) for tally in self.tallies.values()) for name in numbers})

    @property
    def rate(self) -> float:
        """Samples per second, each answered for all variants, of all workers together; 0 before it is known."""
        (start, before), (end, now) = self._speeds[0], self._speeds[-1]
        return (now - before) / (end - start) if end > start else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last answer of all cells, at this speed; None before it is known.

        Before a sample was seen to be answered, at that of the finished units and with the workers of now.
        """
        total = self.total
        if self.rate:
            return total.left / self.rate
        return total.seconds / total.timed * total.left / max(1, total.working) if total.timed else None

    def cells(self) -> list[CellState]:
        """Every cell, as of the last look, in the order of the plan."""
        answered: dict[str, int] = {}
        samples: dict[str, int] = {}
        running: set[str] = set()
        errors: dict[str, str] = {}
        for followed in self._units:
            open_ = {tail.cell.identity.hash: len(tail.good) for tail in followed.tails if not followed.done}
            for cell in followed.unit.cells:
                name = cell.identity.hash
                samples[name] = samples.get(name, 0) + followed.size
                answered[name] = answered.get(name, 0) + open_.get(name, followed.size)
            running |= open_.keys() if followed.working else set()
            errors |= followed.errors
        found = []
        for _, benchmark, cell in self.plan.cells():
            name, variant = cell.identity.hash, cell.identity.variant
            n, size = answered.get(name, 0), samples.get(name, 0)
            status, reason = self._records.get(name, ("", errors.get(name, "").partition("\n")[0]))
            state: State = _STATES.get(status, "failed")
            if not status:
                state = "running" if name in running else "answered" if n == size else "waiting"
            label = variant.name.removeprefix(variant.model).removeprefix(SEPARATOR) or BASELINE
            found.append(CellState(variant.model, benchmark.name, label, state, n, size, reason))
        return found

    def _of(self, followed: _Followed) -> Tally:
        return self.tallies[followed.unit.model, followed.unit.benchmark.name]

    def _follow(self, followed: _Followed, done: set[str], leased: set[str]) -> None:
        unit, tally = followed.unit, self._of(followed)
        if followed.marked and unit.name not in done:  # open again: --retry-failed
            followed.done, followed.marked, followed.seen, followed.tails = False, False, False, _tails(unit)
            tally.units_done -= 1
            self._recount.add((unit.model, unit.benchmark.name))
        followed.working = working = unit.name in leased and held(lease(self.plan, unit.name))
        tally.working += working
        finished = not followed.done and unit.name in done
        if followed.done or (followed.seen and not working and not finished):
            followed.answered = followed.size if followed.done else followed.answered
            return
        there = [tail for tail in followed.tails if tail.read(tally)]
        answered = min([len(tail.good) for tail in there], default=followed.answered)
        followed.failed = len(set[str]().union(*(tail.bad for tail in there)))
        followed.errors = {tail.cell.identity.hash: next(reversed(tail.bad.values())) for tail in there if tail.bad}
        if followed.seen:
            self._add(followed, answered - followed.answered)
        followed.seen, followed.answered = True, answered
        if finished:
            recorded = self._take_mark(followed, tally)
            self._add(followed, min(recorded.answered, followed.size) - followed.fresh)
            followed.done, followed.marked, followed.answered = True, True, followed.size
            followed.tails = []

    def _take_mark(self, followed: _Followed, tally: Tally) -> Mark:
        """Count a unit that is done, by what its worker noted."""
        recorded = Mark()
        with suppress(FileNotFoundError, DamagedError):  # `reopen` says so
            recorded = Mark.read(mark(self.plan, followed.unit))
        tally.units_done += 1
        tally.agree += recorded.agree
        tally.compared += recorded.compared
        tally.seconds += recorded.seconds
        tally.timed += recorded.answered
        followed.failed = recorded.failed
        return recorded

    def _add(self, followed: _Followed, n: int) -> None:
        followed.fresh += max(0, n)
        self._fresh += max(0, n)

    def _count_scored(self) -> None:
        """Records are looked for where all answers are there; before, only those of an earlier run can exist."""
        groups: dict[tuple[str, str, Placement], list[_Followed]] = {}
        for followed in self._units:
            unit = followed.unit
            groups.setdefault((unit.model, unit.benchmark.name, unit.placement), []).append(followed)
        changed = set()
        for (model, benchmark, _), units in groups.items():
            # Ranges of samples have the same cells, but every server is asked for a cell of its own.
            hashes = {cell.identity.hash: cell for followed in units for cell in followed.unit.cells}
            settled = any(f.answered < f.size for f in units) or hashes.keys() <= self._records.keys()
            if settled and (model, benchmark) not in self._recount:
                continue
            changed.add((model, benchmark))
            for name, cell in hashes.items():
                record = cell.load_record()
                self._records.pop(name, None)
                if record is not None:
                    self._records[name] = record["status"], record["reason"]
        for key in changed:
            tally = self.tallies[key]
            tally.scored, tally.reasons, tally.skipped = 0, [], []
            for cell in self.plan.models[key[0]].groups[key[1]][1]:
                status, reason = self._records.get(cell.identity.hash, ("", ""))
                tally.scored += bool(status)
                if status not in ("", "ok"):
                    reasons = tally.skipped if status == "skipped" else tally.reasons
                    reasons.append(f"{cell.identity.variant.name}: {reason}")
            tally.broken = len(tally.reasons)
        self._recount.clear()


def _tails(unit: Unit) -> list[_Tail]:
    return [_Tail(shard(cell, unit), cell) for cell in unit.pending]


def _names(folder: Path, suffix: str) -> set[str]:
    return {path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}")}
