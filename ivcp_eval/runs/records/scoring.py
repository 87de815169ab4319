"""Scores the cells whose units are all answered; it loads no model, so no GPU waits for a judge."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.files import write_json
from ivcp_eval.interface.registry import adapter
from ivcp_eval.reports.table import write_samples
from ivcp_eval.runs.answering.prompts import prompts_of
from ivcp_eval.runs.answering.timing import timings_of
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import ModelPlan, SweepPlan
from ivcp_eval.runs.planning.request import Request, judges_for
from ivcp_eval.runs.records.record import record_of
from ivcp_eval.runs.records.sample_rows import answers_by_index, sample_rows
from ivcp_eval.runs.store.journal import Journal, JournalHeld
from ivcp_eval.runs.store.lease import claim, held
from ivcp_eval.runs.store.state import answers, lease, mark

if TYPE_CHECKING:
    from ivcp_eval.interface import AbstractAdapter
    from ivcp_eval.runs.worker import Stop
    from ivcp_eval.vlmeval_bridge.judge import Judge


def score_any(plan: SweepPlan, stop: Stop, say: Callable[[str], None]) -> tuple[int, bool]:
    """Score what is whole, until asked to stop: (cells scored, anything that is not whole yet or held by others)."""
    scored, waiting, dataset = 0, False, _Dataset()
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
                        _score(model, benchmark, cell, dataset.of(benchmark, model.request.limit), say)
                except JournalHeld:  # `ivcp eval` is at the same cell, or another worker still scores it
                    waiting = True
                    continue
                scored += 1
    return scored, waiting


class _Dataset:
    """VLMEvalKit's data set of the benchmark at hand: read once, handed out anew to every cell."""

    def __init__(self) -> None:
        self._asked: tuple[str, int | None] | None = None
        self._dataset: Any = None
        self._rows: Any = None

    def of(self, benchmark: Benchmark, limit: int | None) -> Any:
        """The data set with all of its rows, whatever an evaluator did to them before."""
        from ivcp_eval.vlmeval_bridge import register

        if self._asked != (benchmark.name, limit):
            self._dataset = self._rows = None  # two need not fit into memory
            register()
            from ivcp_eval.vlmeval_bridge.evaluate import build

            self._dataset = build(benchmark, limit)
            self._asked, self._rows = (benchmark.name, limit), self._dataset.data
        self._dataset.data = self._rows.copy()
        return self._dataset


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


def _score(model: ModelPlan, benchmark: Benchmark, cell: Cell, dataset: Any, say: Callable[[str], None]) -> None:
    with Journal(cell.journal).open() as journal:
        for key, answer in sorted(answers(cell).items()):
            if cell.lacks(journal.records.get(key)) and journal.records.get(key) != answer:
                journal.append(key, answer)
        judge = judges_for(model.request, [(benchmark, cell)]).get(cell.identity.judge)
        record = score_answers(model.request, adapter(model.weights.family), benchmark, cell, journal, dataset, judge)
    say(f"scored {cell.identity.variant.name} on {benchmark.name}: {record['status']} {record['reason']}".rstrip())
    if record["status"] == "ok":
        shutil.rmtree(cell.folder / "shards", ignore_errors=True)


def score_answers(
    request: Request,
    family: AbstractAdapter,
    benchmark: Benchmark,
    cell: Cell,
    journal: Journal,
    dataset: Any,
    judge: Judge | None,
) -> dict[str, Any]:
    """Score what a cell's journal holds and write the cell's files; returns the content of ``run.json``.

    Prompts are not built and VLMEvalKit's loop does not run: rows find their answers by the keys that were noted when
    they were asked. A row without a usable answer counts as wrong; it is never left out.

    Args:
        family: adapter of the model. journal: of the cell, open. dataset: VLMEvalKit's, with the rows that count.
    """
    from ivcp_eval.vlmeval_bridge import evaluate as bridge
    from ivcp_eval.vlmeval_bridge.judge import JudgeError
    from ivcp_eval.vlmeval_bridge.scores import ScoreMissing

    prompts = prompts_of(cell, dataset, family, journal.records)
    indices = [str(index) for index in dataset.data["index"]]
    found = answers_by_index(indices, prompts, journal.records)
    for index, answer in found.items():  # without an answer, and with it a prompt, there is no key but the row
        if answer.error and journal.records.get(prompts.keys.get(index, f"row {index}")) != answer:
            journal.append(prompts.keys.get(index, f"row {index}"), answer)
    work = cell.folder / "vlmeval"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    predictions = bridge.stored(dataset, {index: answer.scored for index, answer in found.items()}, work)
    problem = bridge.data_problem(benchmark)
    try:
        scored = bridge.score(benchmark, dataset, predictions, judge)
    except (JudgeError, ScoreMissing) as error:
        scored, problem = bridge.Scored({}, {}), f"no score: {error}"
    lines = dataset.data.drop(columns="image", errors="ignore").to_dict("records")
    timed = timings_of(cell).samples if request.timing else {}
    samples = sample_rows(benchmark, lines, prompts, found, scored, timed)
    problem = problem or _failures(samples)
    write_samples(cell.predictions, samples)
    used = [answer for answer in found.values() if not answer.error]
    record = {**record_of(cell, scored, samples, used, problem, request.timing), "timeout_s": request.timeout}
    write_json(cell.record, record)
    if record["status"] == "ok":
        shutil.rmtree(work)
    return record


def _failures(samples: Sequence[Mapping[str, Any]]) -> str:
    """How many samples have no answer, and of which kinds; empty if all have one."""
    failed = [row for row in samples if row["error"]]
    if not failed:
        return ""
    kinds = Counter(row["error"].partition(":")[0] for row in failed).most_common()
    counted = ", ".join(f"{kind} {n}" for kind, n in kinds)
    example = f"{failed[0]['index']}: {failed[0]['error']}"
    return f"{len(failed)} of {len(samples)} samples failed ({counted}), e.g. {example}"
