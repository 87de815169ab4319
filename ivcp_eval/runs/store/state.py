"""What a sweep has on disk while it runs: which units are answered, who works on what, and the answers themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ivcp_eval.interface.records import Answer
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import RunPlan, Unit
from ivcp_eval.runs.store.journal import Journal


def mark(plan: RunPlan, unit: Unit) -> Path:
    """The file that says a unit is answered."""
    return plan.state / "done" / f"{unit.name}.json"


def lease(plan: RunPlan, name: str) -> Path:
    """The file that says who works on something."""
    return plan.state / "leases" / f"{name}.lease"


def shard(cell: Cell, unit: Unit) -> Path:
    """The journal of a cell's answers to one unit."""
    return cell.folder / "shards" / f"{unit.start:07d}-{unit.stop:07d}.jsonl"


def answers(cell: Cell, unit: Unit | None = None) -> dict[str, Answer]:
    """What is known of a cell, whoever wrote it; a good answer is preferred to a failed one.

    Args:
        unit: leave out what was written of other rows, whose number grows with the benchmark.
    """
    found: dict[str, Answer] = {}
    paths = sorted((cell.folder / "shards").glob("*.jsonl"))
    if unit is not None:
        paths = [path for path in paths if _overlaps(path, unit)]
    for path in [cell.journal, *paths]:
        for key, answer in Journal(path).load().items():
            if key not in found or cell.lacks(found[key]):
                found[key] = answer
    return found


def _overlaps(path: Path, unit: Unit) -> bool:
    start, stop = (int(text) for text in path.stem.split("-"))
    return start < unit.stop and unit.start < stop


def reopen(plan: RunPlan, failures: bool = False) -> int:
    """Make units open again whose answers are gone (somebody removed their folder); returns how much was opened.

    Args:
        failures: also everything that failed, units and cells.
    """
    count = 0
    if failures:
        shutil.rmtree(plan.state / "lost", ignore_errors=True)
        for _, _, cell in plan.cells():
            record = cell.noted()
            if record is not None and record["status"] not in ("ok", "skipped"):
                cell.record.unlink()
                count += 1
    for unit in plan.units():
        path = mark(plan, unit)
        if not path.exists():
            continue
        failed = failures and json.loads(path.read_text(encoding="utf-8"))["failed"]
        # In this order: a cell that is whole notes so first, then drops its shards.
        if failed or any(not shard(cell, unit).exists() and cell.noted() is None for cell in unit.cells):
            path.unlink()
            count += 1
    return count
