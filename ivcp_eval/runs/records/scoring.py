"""Scores the cells whose units are all answered; it loads no model, so no GPU waits for a judge."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.interface.registry import make_method
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.options import Options
from ivcp_eval.runs.planning.plan import ModelPlan, RunPlan, judge_config
from ivcp_eval.runs.records.recompute import recompute
from ivcp_eval.runs.records.scores import Made, Sample, Scores, unread
from ivcp_eval.runs.store.journal import Journal, JournalHeld
from ivcp_eval.runs.store.lease import claim, held
from ivcp_eval.runs.store.state import answers, lease, mark
from ivcp_eval.vlmeval_bridge.judge import Judge, cache_folder

if TYPE_CHECKING:
    from ivcp_eval.runs.worker import Stop
    from ivcp_eval.vlmeval_bridge.evaluate import Scored
    from ivcp_eval.vlmeval_bridge.model import PrunedVLM


def score_any(plan: RunPlan, stop: Stop, say: Callable[[str], None]) -> tuple[int, bool]:
    """Score what is whole, until asked to stop: (cells scored, anything that is not whole yet or held by others)."""
    scored, waiting = 0, False
    open_units: dict[tuple[str, str], bool] = {}
    for unit in plan.units():
        key = unit.model, unit.benchmark.name
        done = mark(plan, unit).exists() or not unit.pending
        open_units[key] = open_units.get(key, False) or not done
        waiting |= not done and held(lease(plan, unit.name))
    for model, benchmark, cell in plan.cells():
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
                        _score(plan, model, benchmark, cell, say)
                except JournalHeld:  # `ivcp eval` is at the same cell, or another worker still scores it
                    waiting = True
                    continue
                scored += 1
    return scored, waiting


@contextmanager
def _aside(plan: RunPlan) -> Iterator[None]:
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


def _score(plan: RunPlan, model: ModelPlan, benchmark: Benchmark, cell: Cell, say: Callable[[str], None]) -> None:
    from ivcp_eval.vlmeval_bridge import register
    from ivcp_eval.vlmeval_bridge.model import RecordedVLM

    register()
    with Journal(cell.journal).open() as journal:
        for key, record in sorted(answers(cell).items()):
            if cell.lacks(journal.records.get(key)) and journal.records.get(key) != {"key": key, **record}:
                journal.append({**record, "key": key})
    config = judge_config(plan.options, benchmark)
    judge = Judge(config, cache_folder(plan.runs)) if config else None
    recorded = partial(RecordedVLM, model.weights.family, cell.identity.variant)
    record = _score_cell(plan.options, recorded, benchmark, cell, judge)
    say(f"scored {cell.identity.variant.name} on {benchmark.name}: {record['status']} {record['reason']}".rstrip())
    if record["status"] == "ok":
        shutil.rmtree(cell.folder / "shards", ignore_errors=True)


def _score_cell(
    options: Options,
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

    dataset = bridge.build(benchmark, options.limit)
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
        scores = _scores(cell, scored, bridge.sample_rows(benchmark, dataset, prompts, scored), problem, options)
        scores.write(cell.scores)
        record = recompute(cell).to_json()
    if record["status"] == "ok":
        shutil.rmtree(work)
    return record


def _scores(cell: Cell, scored: Scored, rows: Sequence[Mapping[str, Any]], problem: str, options: Options) -> Scores:
    return Scores(
        _made(cell, options),
        dict(scored.metrics),
        tuple(Sample(**{**row, "key": row["key"] or unread(row["index"])}) for row in rows),
        scored.judge_failures,
        scored.remark,
        problem,
    )


def _made(cell: Cell, options: Options) -> Made:
    variant = cell.identity.variant
    label = make_method(variant.method, variant.parameters).label
    return Made.now(cell.identity.code, label, bool(options.timing), options.timeout)


def record_failure(cell: Cell, error: ValueError, options: Options) -> None:
    """Note in the cell's files why it cannot be measured at all: the model cannot (skipped), or a mistake."""
    from ivcp_eval.interface import Unsupported

    cell.note()
    unsupported = isinstance(error, Unsupported)
    Scores(_made(cell, options), problem=str(error), unsupported=unsupported).write(cell.scores)
    recompute(cell)
