"""What a sweep has on disk while it runs: which units are answered, who works on what, and the answers themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from ivcp_eval.files import DamagedError, damage_as_clear_error, read_json, write_json
from ivcp_eval.interface.records import Answer
from ivcp_eval.runs.answering.prompts import Prompts
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import RunPlan, Unit
from ivcp_eval.runs.store.journal import Journal
from ivcp_eval.runs.store.lease import held


def mark(plan: RunPlan, unit: Unit) -> Path:
    """The file that says a unit is answered."""
    return plan.state / "done" / f"{unit.name}.json"


def is_worked_on(plan: RunPlan) -> bool:
    """Whether a live worker, anywhere, holds anything of the run."""
    return any(held(path) for path in (plan.state / "leases").glob("*.lease"))


@dataclass(frozen=True)
class Mark:
    """What the mark of a unit says.

    Attributes:
        samples: of the unit. answered, failed: by the worker that finished it, in ``seconds``.
        agree, compared: answers made together in half precision, of which one of every unit is made alone too.
    """

    samples: int = 0
    answered: int = 0
    failed: int = 0
    seconds: float = 0.0
    agree: int = 0
    compared: int = 0

    def write(self, path: Path) -> None:
        """Atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, vars(self), sealed=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote, or an earlier version, which left the last two out where they are 0.

        Raises:
            FileNotFoundError: the unit is not done. DamagedError: the file holds something else.
        """
        advice = "its unit is open again, and what is answered of it is kept"
        content = read_json(path, advice)
        with damage_as_clear_error(path, advice):
            for field in fields(cls):
                value = content.get(field.name, 0)
                if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                    raise TypeError(f"{field.name} is {value!r}")
            return cls(**content)


def lease(plan: RunPlan, name: str) -> Path:
    """The file that says who works on something."""
    return plan.state / "leases" / f"{name}.lease"


def shard(cell: Cell, unit: Unit) -> Path:
    """The journal of a cell's answers to one unit."""
    return cell.folder / "shards" / f"{unit.start:07d}-{unit.stop:07d}.jsonl"


def answers(cell: Cell, unit: Unit | None = None, say: Callable[[str], None] = lambda text: None) -> dict[str, Answer]:
    """What is known of a cell, whoever wrote it; a good answer is preferred to a failed one.

    Args:
        unit: leave out what was written of other rows, whose number grows with the benchmark.
        say: is told of damaged journals.
    """
    newest: dict[str, Answer] = {}
    paths = sorted((cell.folder / "shards").glob("*.jsonl"))
    if unit is not None:
        paths = [path for path in paths if _overlaps(path, unit)]
    for journal in map(Journal, [cell.journal, *paths]):
        for key, answer in journal.load().items():
            if key not in newest or cell.needs_answer(newest[key]):
                newest[key] = answer
        if journal.damage:
            say(str(journal.damage))
    return newest


def lost(cell: Cell, unit: Unit, known: Mapping[str, Answer]) -> int:
    """How many prompts of a unit that was answered have neither answer nor failure in ``known``, the cell's answers."""
    return len(Prompts.keys_of(cell, unit.start, unit.stop) - known.keys())


def _overlaps(path: Path, unit: Unit) -> bool:
    start, _, stop = path.stem.partition("-")
    return not (start.isdecimal() and stop.isdecimal()) or (int(start) < unit.stop and unit.start < int(stop))


def reopen(plan: RunPlan, failures: bool = False, say: Callable[[str], None] = lambda text: None) -> int:
    """Make units open again whose answers are gone (somebody removed their folder); returns how much was opened.

    Args:
        failures: also everything that failed, units and cells. say: is told of records and marks that are damaged.
    """
    if failures:
        shutil.rmtree(plan.state / "lost", ignore_errors=True)
    again = set()
    for _, _, cell in plan.cells():
        try:
            record = cell.read_record()
        except DamagedError as error:
            say(str(error))
            again.add(cell.folder)
            cell.record.unlink(missing_ok=True)
            continue
        if failures and record is not None and record["status"] not in ("ok", "skipped"):
            cell.record.unlink(missing_ok=True)
            again.add(cell.folder)
    count = len(again)
    for unit in plan.units():
        path = mark(plan, unit)
        try:
            done = Mark.read(path)
        except FileNotFoundError:
            continue
        except DamagedError as error:
            say(str(error))
            done = None
        # In this order: a cell that is whole notes so first, then drops its shards.
        if (
            done is None
            or (failures and done.failed)
            or any(
                (not shard(cell, unit).exists() and cell.load_record() is None)
                or (cell.folder in again and _failed(cell, unit, answers(cell, unit)))
                for cell in unit.cells
            )
        ):
            path.unlink(missing_ok=True)
            count += 1
    return count


def _failed(cell: Cell, unit: Unit, known: Mapping[str, Answer]) -> bool:
    return any(cell.needs_answer(known.get(key)) for key in Prompts.keys_of(cell, unit.start, unit.stop))
