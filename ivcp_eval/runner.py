"""Runs a model unpruned and pruned on benchmarks: reuse the cells that are finished, run the rest, write the CSV.

Knows no method and no family by name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.accounting import described
from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.cell_record import cell_rows, record_of
from ivcp_eval.cells import Cell
from ivcp_eval.failures import misses
from ivcp_eval.files import write_json
from ivcp_eval.journal import Journal
from ivcp_eval.judge import Judge
from ivcp_eval.planning import Plan, Request, judges_for, make_plan
from ivcp_eval.results import write_results, write_samples
from ivcp_eval.variants import PROMPT

if TYPE_CHECKING:
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
    for line in plan.notices:
        say(line)
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
    from ivcp_eval.session import timed_load
    from ivcp_eval.vlmeval_bridge.model import PrunedVLM

    session, seconds = timed_load(plan.weights, plan.placement, plan.limits, request.trust_remote_code, request.timeout)
    place = plan.placement
    say(f"loaded {request.variant.model} in {seconds:.1f} s ({place.dtype}, {place.attention}, {place.device})")
    for _, cell in pending:
        session.check(cell.identity.variant)
    judges = judges_for(request, pending)
    for number, (benchmark, cell) in enumerate(pending, 1):
        say(f"[{number}/{len(pending)}] {cell.identity.variant.name} on {benchmark.name}")
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
    from ivcp_eval.judge import JudgeError
    from ivcp_eval.scores import ScoreMissing
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    dataset = bridge.build(benchmark, request.limit)
    with Journal(cell.journal).open() as journal:
        model = answers(journal)
        prompts = bridge.prompts(dataset, model)
        work = cell.folder / "vlmeval"
        for index, why in prompts.broken.items():  # without a prompt there is no key but the row
            if journal.records.get(f"row {index}", {}).get("error") != why["error"]:
                journal.append({"key": f"row {index}", **why})
        predictions = bridge.infer(dataset, model, work, prompts.broken)
        problem = bridge.data_problem(benchmark)
        try:
            scored = bridge.score(benchmark, dataset, predictions, judge)
        except (JudgeError, ScoreMissing) as error:
            scored, problem = bridge.Scored({}, {}), f"no score: {error}"
        samples = bridge.sample_rows(benchmark, dataset, prompts, journal, scored)
        failed, refused = misses(samples, journal.records)
        problem = problem or failed
        scored = replace(scored, remark="; ".join(filter(None, (scored.remark, refused))))
        if not request.timing:
            samples = [{**row, "prefill_ms": None, "decode_ms": None} for row in samples]
        write_samples(cell.predictions, samples)
        used = [journal.records[row["prompt_sha256"]] for row in samples if not row["error"]]
        record = {**record_of(cell, scored, samples, used, problem, request.timing), "timeout_s": request.timeout}
        write_json(cell.record, record)
    if record["status"] == "ok":
        shutil.rmtree(work)
    return record


def record_failure(cell: Cell, error: ValueError, timing: bool) -> None:
    """Note in the cell's ``run.json`` why it cannot be measured at all: the model cannot (skipped), or a mistake."""
    from ivcp_eval.interface import Unsupported
    from ivcp_eval.vlmeval_bridge.evaluate import Scored

    cell.folder.mkdir(parents=True, exist_ok=True)
    record = record_of(cell, Scored({}, {}), [], [], str(error), timing)
    write_json(cell.record, {**record, "status": "skipped" if isinstance(error, Unsupported) else "failed"})
