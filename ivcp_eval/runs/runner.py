"""Runs a model unpruned and pruned on benchmarks: reuse the cells that are finished, run the rest, write the CSV.

Knows no method and no family by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.engine.cost.predicted import described
from ivcp_eval.interface.registry import make_method
from ivcp_eval.reports.table import write_results
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.request import Plan, Request, judges_for, make_plan
from ivcp_eval.runs.planning.uncounted import uncounted_lines
from ivcp_eval.runs.records.recompute import recompute
from ivcp_eval.runs.records.rows import cell_rows
from ivcp_eval.runs.records.scores import Made, Sample, Scores, unread
from ivcp_eval.runs.store.journal import Journal
from ivcp_eval.vlmeval_bridge.judge import Judge

if TYPE_CHECKING:
    from ivcp_eval.vlmeval_bridge.evaluate import Scored
    from ivcp_eval.vlmeval_bridge.model import PrunedVLM


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
    outcome = Outcome(csv=request.output or _output(request, plan), reused=len(plan.cells) - len(pending))
    outcome.problems += plan.missing
    if outcome.reused:
        say(f"reusing {outcome.reused} finished of {len(plan.cells)} cells (a cell is one variant on one benchmark)")
    for text in uncounted_lines(cell for _, cell in pending):
        say(text)
    if pending:
        _run_pending(request, plan, pending, outcome, say)
    rows = [row for benchmark, cell in plan.cells for row in cell_rows(plan.weights, benchmark, cell, outcome.csv)]
    outcome.csv.parent.mkdir(parents=True, exist_ok=True)
    write_results(outcome.csv, rows)
    return outcome


def _output(request: Request, plan: Plan) -> Path:
    return request.runs.parent / "eval" / f"{plan.cells[-1][1].identity.variant.name}.csv"


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
    from ivcp_eval.vlmeval_bridge.model import PrunedVLM

    session, seconds = timed_load(plan.weights, plan.placement, plan.limits, request.trust_remote_code, request.timeout)
    place = plan.placement
    say(f"loaded {request.variant.model} in {seconds:.1f} s ({place.dtype}, {place.attention}, {place.device})")
    for _, cell in pending:
        session.check(cell.identity.variant)
    judges = judges_for(request, pending)
    for number, (benchmark, cell) in enumerate(pending, 1):
        say(f"[{number}/{len(pending)}] {cell.identity.variant.name} on {benchmark.name}")
        cell.note(asdict(session.shape))
        answers = partial(PrunedVLM, session, cell.identity.variant)
        record = run_cell(request, answers, benchmark, cell, judges.get(cell.identity.judge))
        if record["status"] == "ok":
            outcome.computed += 1
        else:
            outcome.problems.append(f"{cell.identity.variant.name} on {benchmark.name}: {record['reason']}")


def run_cell(
    request: Request,
    answers: Callable[[Journal], PrunedVLM],
    benchmark: Benchmark,
    cell: Cell,
    judge: Judge | None,
) -> dict[str, Any]:
    """Answer what the cell's journal lacks, score, and write the cell's files; returns the content of ``run.json``.

    Args:
        answers: makes the model that VLMEvalKit asks, from the open journal.
    """
    from ivcp_eval.vlmeval_bridge import evaluate as bridge
    from ivcp_eval.vlmeval_bridge.judge import JudgeError
    from ivcp_eval.vlmeval_bridge.scores import ScoreMissing

    dataset = bridge.build(benchmark, request.limit)
    cell.note()
    with Journal(cell.journal).open() as journal:
        model = answers(journal)
        prompts = bridge.prompts(dataset, model)
        work = cell.folder / "vlmeval"
        for index, why in prompts.broken.items():  # without a prompt there is no key but the row
            if journal.records.get(unread(index), {}).get("error") != why["error"]:
                journal.append({"key": unread(index), **why})
        predictions = bridge.infer(dataset, model, work, prompts.broken)
        problem = bridge.data_problem(benchmark)
        try:
            scored = bridge.score(benchmark, dataset, predictions, judge)
        except (JudgeError, ScoreMissing) as error:
            scored, problem = bridge.Scored({}, {}), f"no score: {error}"
        scores = _scores(cell, scored, bridge.sample_rows(benchmark, dataset, prompts, scored), problem, request)
        scores.write(cell.scores)
        record = recompute(cell).to_json()
    if record["status"] == "ok":
        shutil.rmtree(work)
    return record


def _scores(cell: Cell, scored: Scored, rows: Sequence[Mapping[str, Any]], problem: str, request: Request) -> Scores:
    return Scores(
        _made(cell, request.timing, request.timeout),
        dict(scored.metrics),
        tuple(Sample(**{**row, "key": row["key"] or unread(row["index"])}) for row in rows),
        scored.judge_failures,
        scored.remark,
        problem,
    )


def _made(cell: Cell, timing: bool, timeout: float | None = None) -> Made:
    variant = cell.identity.variant
    faithfulness = make_method(variant.method, variant.parameters).faithfulness
    return Made.now(cell.identity.code, faithfulness, timing, timeout)


def record_failure(cell: Cell, error: ValueError, timing: bool) -> None:
    """Note in the cell's files why it cannot be measured at all: the model cannot (skipped), or a mistake."""
    from ivcp_eval.interface import Unsupported

    cell.note()
    unsupported = isinstance(error, Unsupported)
    Scores(_made(cell, timing), problem=str(error), unsupported=unsupported).write(cell.scores)
    recompute(cell)
