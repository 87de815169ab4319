"""Scores the cells whose units are all answered; it loads no model, so no GPU waits for a judge."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import ModelPlan, SweepPlan
from ivcp_eval.runs.planning.request import judges_for
from ivcp_eval.runs.runner import run_cell
from ivcp_eval.runs.store.journal import Journal, JournalHeld
from ivcp_eval.runs.store.lease import claim, held
from ivcp_eval.runs.store.state import answers, lease, mark

if TYPE_CHECKING:
    from ivcp_eval.runs.worker import Stop


def score_any(plan: SweepPlan, stop: Stop, say: Callable[[str], None]) -> tuple[int, bool]:
    """Score what is whole, until asked to stop: (cells scored, anything that is not whole yet or held by others)."""
    scored, waiting = 0, False
    open_units: dict[tuple[str, str], bool] = {}
    for unit in plan.units():
        key = unit.model, unit.benchmark.name
        done = mark(plan, unit).exists() or not unit.pending
        open_units[key] = open_units.get(key, False) or not done
        waiting |= not done and held(lease(plan, unit.name))
    for model, benchmark, cell in plan.scored():
        if stop.requested:
            break
        if cell.noted() is not None or open_units.get((cell.identity.variant.model, benchmark.name), False):
            continue
        with claim(lease(plan, f"score.{cell.identity.hash}")) as mine:
            if not mine:
                waiting = True
            elif cell.noted() is None:
                try:
                    with _aside(plan):
                        _score(model, benchmark, cell, say)
                except JournalHeld:  # `ivcp eval` is at the same cell, or another worker still scores it
                    waiting = True
                    continue
                scored += 1
    return scored, waiting


@contextmanager
def _aside(plan: SweepPlan) -> Iterator[None]:
    """VLMEvalKit's bars, one for each cell, go to a log: answers are known, so they show nothing but flicker."""
    path = plan.state / "logs" / "scoring.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with redirect_stderr(_Log(path)):
        yield


class _Log(io.TextIOBase):
    """Opens its file for each write: loggers that were set up meanwhile keep it, and go on writing to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> int:
        with self.path.open("a", encoding="utf-8") as stream:
            return stream.write(text)


def _score(model: ModelPlan, benchmark: Benchmark, cell: Cell, say: Callable[[str], None]) -> None:
    from ivcp_eval.vlmeval_bridge import register
    from ivcp_eval.vlmeval_bridge.model import RecordedVLM

    register()
    with Journal(cell.journal).open() as journal:
        for key, record in sorted(answers(cell).items()):
            if cell.lacks(journal.records.get(key)) and journal.records.get(key) != {"key": key, **record}:
                journal.append({**record, "key": key})
    judge = judges_for(model.request, [(benchmark, cell)]).get(cell.identity.judge)
    recorded = partial(RecordedVLM, model.weights.family, cell.identity.variant)
    record = run_cell(model.request, recorded, benchmark, cell, judge)
    say(f"scored {cell.identity.variant.name} on {benchmark.name}: {record['status']} {record['reason']}".rstrip())
    if record["status"] == "ok":
        shutil.rmtree(cell.folder / "shards", ignore_errors=True)
