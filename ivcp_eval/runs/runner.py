"""Runs a model unpruned and pruned on benchmarks: reuse the cells that are finished, run the rest, write the CSV.

Knows no method and no family by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.engine.cost.predicted import described
from ivcp_eval.files import write_json
from ivcp_eval.interface.variants import PROMPT
from ivcp_eval.reports.table import write_results
from ivcp_eval.runs.answering.prompts import Prompts
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.request import Plan, Request, judges_for, make_plan
from ivcp_eval.runs.records.record import cell_rows, record_of
from ivcp_eval.runs.records.scoring import score_answers
from ivcp_eval.runs.store.journal import Journal
from ivcp_eval.vlmeval_bridge.judge import Judge

if TYPE_CHECKING:
    from ivcp_eval.runs.answering.session import Session


@dataclass
class Outcome:
    """What came of a request.

    Attributes:
        csv: the results file. reused, computed: finished cells found and made. problems: one line for each cell that
            is not whole; empty means success.
    """

    csv: Path
    reused: int = 0
    computed: int = 0
    problems: list[str] = field(default_factory=list)


def evaluate(request: Request, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Run (or reuse) every cell of a request and write its CSV.

    Raises:
        ValueError: an unknown name or a bad parameter. MissingWeights, DataMissing: with how to get them.
        RuntimeError: another process evaluates the same cell. DiskFullError: nothing half-written is left.
    """
    plan = make_plan(request)
    for budgeted in {cell.identity.variant.name: cell.identity.variant for _, cell in plan.cells}.values():
        if budgeted.budget is not None:
            if budgeted.budget.problem:
                raise ValueError(budgeted.budget.problem)
            say(described(budgeted))
    pending = [(benchmark, cell) for benchmark, cell in plan.cells if cell.finished() is None]
    outcome = Outcome(csv=request.output or _output(request), reused=len(plan.cells) - len(pending))
    outcome.problems += plan.missing
    if outcome.reused:
        say(f"reusing {outcome.reused} finished of {len(plan.cells)} cells (a cell is one variant on one benchmark)")
    if pending:
        _run_pending(request, plan, pending, outcome, say)
    rows = [row for benchmark, cell in plan.cells for row in cell_rows(plan.weights, benchmark, cell, outcome.csv)]
    outcome.csv.parent.mkdir(parents=True, exist_ok=True)
    write_results(outcome.csv, rows)
    return outcome


def _output(request: Request) -> Path:
    name, budget = request.variant.name, request.variant.budget
    unnamed = dict(request.variant.parameters)
    if budget is not None and budget.prompt not in (None, PROMPT):
        unnamed["budget_prompt"] = budget.prompt
    if unnamed:
        text = json.dumps(unnamed, sort_keys=True, default=str)
        name += "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return request.runs.parent / "eval" / f"{name}.csv"


def _run_pending(
    request: Request,
    plan: Plan,
    pending: Sequence[tuple[Benchmark, Cell]],
    outcome: Outcome,
    say: Callable[[str], None],
) -> None:
    from ivcp_eval.vlmeval_bridge import register

    register()
    from ivcp_eval.runs.answering.session import timed_load

    session, seconds = timed_load(plan.weights, plan.placement, plan.limits, request.trust_remote_code, request.timeout)
    place = plan.placement
    say(f"loaded {request.variant.model} in {seconds:.1f} s ({place.dtype}, {place.attention}, {place.device})")
    for _, cell in pending:
        session.check(cell.identity.variant)
    judges = judges_for(request, pending)
    for number, (benchmark, cell) in enumerate(pending, 1):
        say(f"[{number}/{len(pending)}] {cell.identity.variant.name} on {benchmark.name}")
        record = _run_cell(request, session, benchmark, cell, judges.get(cell.identity.judge))
        if record["status"] == "ok":
            outcome.computed += 1
        else:
            outcome.problems.append(f"{cell.identity.variant.name} on {benchmark.name}: {record['reason']}")


def _run_cell(
    request: Request, session: Session, benchmark: Benchmark, cell: Cell, judge: Judge | None
) -> dict[str, Any]:
    """Answer what the cell's journal lacks, score, and write the cell's files; returns the content of ``run.json``."""
    from ivcp_eval.runs.answering.live import live_model
    from ivcp_eval.vlmeval_bridge import evaluate as bridge
    from ivcp_eval.vlmeval_bridge.model import Prompting

    dataset = bridge.build(benchmark, request.limit)
    with Journal(cell.journal).open() as journal:
        prompts = Prompts.of(bridge.messages(dataset, Prompting(session.adapter)))
        prompts.note(cell, 0, len(dataset.data))
        model = live_model(session, cell.identity.variant, journal)
        bridge.infer(dataset, model, cell.folder / "vlmeval", prompts.broken)
        return score_answers(request, session.adapter, benchmark, cell, journal, dataset, judge)


def record_failure(cell: Cell, error: ValueError, timing: bool) -> None:
    """Note in the cell's ``run.json`` why it cannot be measured at all: the model cannot (skipped), or a mistake."""
    from ivcp_eval.interface import Unsupported
    from ivcp_eval.vlmeval_bridge.evaluate import Scored

    cell.folder.mkdir(parents=True, exist_ok=True)
    record = record_of(cell, Scored({}, {}), [], [], str(error), timing)
    write_json(cell.record, {**record, "status": "skipped" if isinstance(error, Unsupported) else "failed"})
