"""Scores the cells whose units are all answered; it loads no model, so no GPU waits for a judge."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.files import DiskFullError, room_left
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.registry import adapter, make_method
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.runs.answering.prompts import prompts_of
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.options import Options
from ivcp_eval.runs.planning.plan import ModelPlan, RunPlan, judge_config
from ivcp_eval.runs.records.recompute import recompute
from ivcp_eval.runs.records.record import CellRecord
from ivcp_eval.runs.records.sample_rows import answers_by_index, samples
from ivcp_eval.runs.records.scores import Made, Scores, unread
from ivcp_eval.runs.records.state import answers, lease, lost, mark
from ivcp_eval.runs.store.journal import Journal, JournalHeld
from ivcp_eval.runs.store.lease import claim, held
from ivcp_eval.vlmeval_bridge.judge import Judge, cache_folder

if TYPE_CHECKING:
    from ivcp_eval.interface import AbstractAdapter
    from ivcp_eval.runs.worker import Stop


def score_any(plan: RunPlan, stop: Stop, say: Callable[[str], None]) -> tuple[int, bool]:
    """Score what is whole, until asked to stop: (cells scored, anything that is not whole yet or held by others)."""
    scored, waiting, dataset = 0, False, _Dataset()
    open_cells: set[str] = set()
    for unit in plan.units():
        done = mark(plan, unit).exists() or not unit.pending
        open_cells |= set() if done else {cell.identity.hash for cell in unit.cells}
        waiting |= not done and held(lease(plan, unit.name))
    for model, benchmark, cell in plan.cells():
        if stop.requested:
            break
        if cell.load_record() is not None or _read_for(model, benchmark, cell) & open_cells:
            continue
        with claim(lease(plan, f"score.{cell.identity.hash}")) as mine:
            if not mine:
                waiting = True
            elif cell.load_record() is None:
                try:
                    with aside(plan.state):
                        whole = _score(plan, model, benchmark, cell, dataset.of(benchmark, plan.options.limit), say)
                except JournalHeld:  # `ivcp eval` is at the same cell, or another worker still scores it
                    whole = False
                waiting |= not whole
                scored += whole
    return scored, waiting


class _Dataset:
    """VLMEvalKit's data set of the benchmark at hand: read once, handed out anew to every cell."""

    def __init__(self) -> None:
        self._loaded: tuple[str, int | None] | None = None
        self._dataset: Any = None
        self._rows: Any = None

    def of(self, benchmark: Benchmark, limit: int | None) -> Any:
        """The data set with all of its rows, whatever an evaluator did to them before."""
        from ivcp_eval.vlmeval_bridge import register

        if self._loaded != (benchmark.name, limit):
            self._dataset = self._rows = None  # two need not fit into memory
            register()
            from ivcp_eval.vlmeval_bridge.evaluate import build

            self._dataset = build(benchmark, limit)
            self._loaded, self._rows = (benchmark.name, limit), self._dataset.data
        self._dataset.data = self._rows.copy()
        return self._dataset


@contextmanager
def aside(state: Path) -> Iterator[None]:
    """VLMEvalKit's bars, one for each cell, go to a log: answers are known, so they show nothing but flicker.

    Args:
        state: folder of the run, below which the log is.
    """
    path = state / "logs" / "scoring.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with redirect_stderr(_Log(path)):
        yield


class _Log(io.TextIOBase):
    """Opens its file for each write: loggers that were set up meanwhile keep it, and go on writing to it.

    What a full disk does not take of it is lost; results say so themselves.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> int:
        with suppress(OSError), self.path.open("a", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
        return len(text)


def _score(
    plan: RunPlan, model: ModelPlan, benchmark: Benchmark, cell: Cell, dataset: Any, say: Callable[[str], None]
) -> bool:
    """Whether the cell was scored; where answers are gone, their units are open again instead."""
    with Journal(cell.journal).open() as journal:
        known = answers(cell, say=say)
        if _reopened(plan, cell, known, say):
            return False
        for key, answer in sorted(known.items()):
            if cell.needs_answer(journal.records.get(key)) and journal.records.get(key) != answer:
                journal.append(key, answer)
        config = judge_config(plan.options, benchmark)
        judge = Judge(config, cache_folder(plan.runs)) if config else None
        if judge and judge.cache.unreadable:
            say(f"{judge.cache.path}: {judge.cache.unreadable} damaged lines do not count and are asked again")
        family = adapter(model.weights.family)
        reference = _unpruned(model, benchmark, cell, known, say) if benchmark.reference == "baseline" else None
        record = score_answers(plan.options, family, benchmark, cell, journal, dataset, judge, reference)
    say(f"scored {cell.identity.variant.name} on {benchmark.name}: {record.status} {record.reason}".rstrip())
    if record.status == "ok":
        shutil.rmtree(cell.folder / "shards", ignore_errors=True)
    return True


def _read_for(model: ModelPlan, benchmark: Benchmark, cell: Cell) -> set[str]:
    """Hashes of the cells whose answers it takes to score one."""
    found = {cell.identity.hash}
    return found | {_baseline(model, benchmark).identity.hash} if benchmark.reference == "baseline" else found


def _baseline(model: ModelPlan, benchmark: Benchmark) -> Cell:
    _, group = model.groups[benchmark.name]
    return next(other for other in group if other.identity.variant.method == BASELINE)  # every plan has it


def _unpruned(
    model: ModelPlan, benchmark: Benchmark, cell: Cell, known: Mapping[str, Answer], say: Callable[[str], None]
) -> Mapping[str, Answer]:
    """The unpruned model's answers to a benchmark, by the key of their prompt; ``known`` are the cell's own."""
    baseline = _baseline(model, benchmark)
    return known if baseline == cell else answers(baseline, say=say)


def _reopened(plan: RunPlan, cell: Cell, known: Mapping[str, Answer], say: Callable[[str], None]) -> bool:
    opened = False
    for unit in plan.units():
        path = mark(plan, unit)
        if cell in unit.cells and path.exists() and (n := lost(cell, unit, known)):
            path.unlink(missing_ok=True)
            say(f"{n} answers of {cell.identity.variant.name} on {unit.benchmark.name} are gone and are made again")
            opened = True
    return opened


def score_answers(
    options: Options,
    family: AbstractAdapter,
    benchmark: Benchmark,
    cell: Cell,
    journal: Journal,
    dataset: Any,
    judge: Judge | None,
    unpruned: Mapping[str, Answer] | None = None,
) -> CellRecord:
    """Score what a cell's journal holds and write the cell's files.

    Prompts are not built and VLMEvalKit's loop does not run: rows find their answers by the keys that were noted when
    they were asked. A row without a usable answer counts as wrong; it is never left out.

    Args:
        family: adapter of the model. journal: of the cell, open. dataset: VLMEvalKit's, with the rows that count.
        unpruned: the unpruned model's answers by the key of their prompt, where they stand for the true ones.
    """
    from ivcp_eval.vlmeval_bridge import evaluate as bridge
    from ivcp_eval.vlmeval_bridge.judge import JudgeError
    from ivcp_eval.vlmeval_bridge.scores import ScoreMissing

    cell.note()
    prompts = prompts_of(cell, dataset, family, journal.records)
    indices = [str(index) for index in dataset.data["index"]]
    answers = answers_by_index(indices, prompts, journal.records)
    for index, answer in answers.items():  # without an answer, and with it a prompt, there is no key but the row
        if answer.error and journal.records.get(prompts.keys.get(index, unread(index))) != answer:
            journal.append(prompts.keys.get(index, unread(index)), answer)
    work = cell.folder / "vlmeval"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    problem = bridge.data_problem(benchmark)
    lines = dataset.data.drop(columns="image", errors="ignore").to_dict("records")
    try:
        if unpruned is None:
            predictions = bridge.stored(dataset, {index: answer.scored for index, answer in answers.items()}, work)
            scored = bridge.score(benchmark, dataset, predictions, judge)
        else:
            reference = _good(answers_by_index(indices, prompts, unpruned))
            lines = [{**line, "answer": reference.get(str(line["index"]), "")} for line in lines]
            scored = bridge.agreed(benchmark, _good(answers), reference)
            if left_out := len(indices) - len(reference):
                problem = f"{left_out} rows are left out: the unpruned model's answers to them failed"
    except ValueError as error:  # of a file that the evaluator could not write
        _check_room(work, error)
        raise
    except (JudgeError, ScoreMissing) as error:
        _check_room(work, error)
        scored, problem = bridge.Scored({}, {}), f"no score: {error}"
    Scores(
        _made(cell, options),
        dict(scored.metrics),
        samples(benchmark, lines, prompts, scored),
        scored.judge_failures,
        scored.remark,
        problem,
        thinking=scored.thinking,
    ).write(cell.scores)
    record = recompute(cell)
    if record.status == "ok":
        shutil.rmtree(work)
    return record


def _good(answers: Mapping[str, Answer]) -> dict[str, str]:
    return {index: answer.scored for index, answer in answers.items() if not answer.error}


def _check_room(folder: Path, error: Exception) -> None:
    """Raise DiskFullError in place of what an evaluator says of files that it could not write."""
    if not room_left(folder):
        raise DiskFullError(
            f"no space is left at {folder}, where VLMEvalKit evaluates; free some and run the same command again: the "
            "answers are kept"
        ) from error


def _made(cell: Cell, options: Options) -> Made:
    variant = cell.identity.variant
    label = make_method(variant.method, variant.parameters).label
    return Made.now(label, bool(options.timing), options.timeout)


def record_failure(cell: Cell, error: ValueError, options: Options) -> None:
    """Note in the cell's files why it cannot be measured at all: the model cannot (skipped), or a mistake."""
    from ivcp_eval.interface import Unsupported

    cell.note()
    unsupported = isinstance(error, Unsupported)
    Scores(_made(cell, options), problem=str(error), unsupported=unsupported).write(cell.scores)
    recompute(cell)
