"""Scores the cells whose units are all answered; it loads no model, so no GPU waits for a judge."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.files import write_json
from ivcp_eval.interface.failures import misses
from ivcp_eval.reports.table import write_samples
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.options import Options
from ivcp_eval.runs.planning.plan import ModelPlan, RunPlan, judge_config
from ivcp_eval.runs.records.record import record_of
from ivcp_eval.runs.store.journal import Journal, JournalHeld
from ivcp_eval.runs.store.lease import claim, held
from ivcp_eval.runs.store.state import answers, lease, mark
from ivcp_eval.vlmeval_bridge.judge import Judge, cache_folder

if TYPE_CHECKING:
    from ivcp_eval.runs.worker import Stop
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
        if not options.timing:
            samples = [{**row, "prefill_ms": None, "decode_ms": None} for row in samples]
        write_samples(cell.predictions, samples)
        used = [journal.records[row["prompt_sha256"]] for row in samples if not row["error"]]
        record = {**record_of(cell, scored, samples, used, problem, bool(options.timing)), "timeout_s": options.timeout}
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
