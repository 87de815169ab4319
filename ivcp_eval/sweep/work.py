"""A worker: takes units of work until none is left, answers them, and scores the cells that are whole.

Every answer is appended to a journal and flushed before the next sample, so a worker may be killed at any moment and
another goes on behind the last answer. Nothing is ever averaged over part of a cell.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.cells import Cell
from ivcp_eval.failures import FAILURES
from ivcp_eval.files import write_json
from ivcp_eval.journal import Journal, JournalHeld
from ivcp_eval.planning import judges_for
from ivcp_eval.runner import record_failure, run_cell
from ivcp_eval.sweep.lease import claim, held
from ivcp_eval.sweep.plan import ModelPlan, SweepPlan, Unit
from ivcp_eval.sweep.samples import Agreement, Answered, DeviceLost, Losses, Records, answered_samples

if TYPE_CHECKING:
    from ivcp_eval.session import Session

POLL_S = 0.5


class Stop:
    """Whether the worker was asked to end; it then finishes the sample at hand, so nothing is lost or cut short."""

    def __init__(self) -> None:
        self.requested = False
        self.signal: int | None = None

    @contextmanager
    def signals(self) -> Iterator[Stop]:
        """Listen to SIGTERM, SIGUSR1 and SIGUSR2, which clusters send before they preempt or end a job."""
        wanted = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        before = {number: signal.signal(number, self._ask) for number in wanted}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        self.requested, self.signal = True, number


@dataclass
class Report:
    """What one worker did.

    Attributes:
        units, samples, scored: finished by it. failed: samples without an answer. stopped: it was asked to end.
        broken: models that could not be loaded.
    """

    units: int = 0
    samples: int = 0
    scored: int = 0
    failed: int = 0
    stopped: bool = False
    broken: set[str] = field(default_factory=set)
    sessions: dict[str, Any] = field(default_factory=dict, repr=False)
    dataset: tuple[Any, Any] = field(default=(None, None), repr=False)


@dataclass(frozen=True)
class Hooks:
    """What a worker tells, in lines; how far it is stands in its journals (`watch.py`).

    Attributes:
        say: what was done. warn: what went wrong.
    """

    say: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None


def mark(plan: SweepPlan, unit: Unit) -> Path:
    """The file that says a unit is answered."""
    return plan.state / "done" / f"{unit.name}.json"


def lease(plan: SweepPlan, name: str) -> Path:
    """The file that says who works on something."""
    return plan.state / "leases" / f"{name}.lease"


def work(plan: SweepPlan, stop: Stop, hooks: Hooks, answer: bool = True, score: bool = True, model: str = "") -> Report:
    """Take what is left of a sweep until nothing is, or until asked to stop.

    Args:
        answer, score: which kinds of work; scoring needs no GPU. model: only units of this model.

    Raises:
        DiskFullError: nothing half-written is left; run again when there is space. DeviceLost: this process can answer
            nothing more; another one can.
    """
    report = Report()
    while not stop.requested:
        left = busy = False
        if answer:
            taken, waiting = _answer_any(plan, stop, hooks, report, model)
            left, busy = left or taken, busy or waiting
        if score and not stop.requested:
            taken, waiting = _score_any(plan, stop, hooks, report)
            left, busy = left or taken, busy or waiting
        if not left and not busy:
            break
        if not left:
            time.sleep(POLL_S)  # others hold what is left; should they die, it is taken over
    report.stopped = stop.requested
    report.sessions.clear()
    report.dataset = None, None
    return report


# -- answers ----------------------------------------------------------------------------------------------------------


def _answer_any(plan: SweepPlan, stop: Stop, hooks: Hooks, report: Report, model: str) -> tuple[bool, bool]:
    """(anything done, anything held by others)."""
    taken = waiting = False
    for unit in plan.units():
        if stop.requested:
            break
        if (model and unit.model != model) or unit.model in report.broken:
            continue
        if mark(plan, unit).exists() or not unit.pending:
            continue
        with claim(lease(plan, unit.name)) as mine:
            if not mine:
                waiting = True
            elif not mark(plan, unit).exists():
                try:
                    _answer(plan, unit, stop, hooks, report)
                    taken = True
                except JournalHeld:  # a worker that lost its claim is still writing its last sample
                    waiting = True
    return taken, waiting


def _answer(plan: SweepPlan, unit: Unit, stop: Stop, hooks: Hooks, report: Report) -> None:
    session = _session(plan, unit.model, hooks, report)
    if session is None:
        return
    cells = _runnable(plan, session, unit)
    for cell in cells:
        if cell.noted() is not None:
            cell.record.unlink(missing_ok=True)  # of another sweep or `ivcp eval`, incomplete; it is scored anew
    dataset = _dataset(plan, unit, report)
    losses = Losses(plan.state / "lost" / f"{unit.name}.json")
    start = time.monotonic()
    with ExitStack() as stack:
        journals = [stack.enter_context(Journal(shard(cell, unit)).open()) for cell in cells]
        known = [answers(cell, unit) for cell in cells]
        answered = failed = 0
        agreement = Agreement()

        def keep(sample: Answered) -> None:
            key, records = sample
            for cell, journal, before, record in zip(cells, journals, known, records, strict=True):
                if record is not None and record is not before.get(key) and cell.lacks(before.get(key)):
                    journal.append({**record, "key": key})
                    before[key] = record

        try:
            for key, records in answered_samples(plan, unit, session, dataset, cells, known, losses, agreement):
                if not records:  # its picture cannot be read; `run_cell` notes why
                    failed += 1
                    continue
                keep((key, records))
                answered += 1
                failed += any(before[key]["error"] for before in known)
                if stop.requested:
                    break
        except DeviceLost as lost:
            for sample in lost.samples:
                keep(sample)
            losses.add(lost)
            raise
        for journal in journals:
            journal.sync()  # before the mark, which stays after a crash of the machine
    report.samples += answered
    report.failed += failed
    if stop.requested:
        return
    seconds = time.monotonic() - start
    mark(plan, unit).parent.mkdir(parents=True, exist_ok=True)
    done = {"samples": unit.stop - unit.start, "answered": answered, "failed": failed, "seconds": seconds}
    write_json(mark(plan, unit), done | (asdict(agreement) if agreement.compared else {}))
    report.units += 1
    hooks.say(
        f"{unit.model} on {unit.benchmark.name}, rows {unit.start}-{unit.stop}: {answered} answered, {failed} failed"
    )


def _session(plan: SweepPlan, model: str, hooks: Hooks, report: Report) -> Session | None:
    """The model in memory, one at a time; None if it cannot be loaded, which ends no work on others."""
    from ivcp_eval.session import timed_load
    from ivcp_eval.vlmeval_bridge import register

    if model not in report.sessions:
        report.sessions.clear()
        register()
        own = plan.models[model]
        try:
            found, seconds = timed_load(
                own.weights, own.plan.placement, own.plan.limits, own.request.trust_remote_code, own.request.timeout
            )
        except FAILURES as error:
            report.broken.add(model)
            hooks.warn(f"{model} could not be loaded, so nothing of it is answered: {type(error).__name__}: {error}")
            return None
        report.sessions[model] = found
        hooks.say(f"loaded {model} in {seconds:.1f} s")
    session: Session = report.sessions[model]
    return session


def _dataset(plan: SweepPlan, unit: Unit, report: Report) -> Any:
    """VLMEvalKit's data set; the last one is kept, since reading it takes as long as many answers."""
    from ivcp_eval.vlmeval_bridge.evaluate import build

    asked = unit.benchmark.name, plan.models[unit.model].request.limit
    if report.dataset[0] != asked:
        report.dataset = None, None  # two need not fit into memory
        report.dataset = asked, build(unit.benchmark, asked[1])
    return report.dataset[1]


def _runnable(plan: SweepPlan, session: Session, unit: Unit) -> list[Cell]:
    """The unit's unfinished cells whose method works on the model; the others are recorded with the reason."""
    found = []
    for cell in unit.pending:
        try:
            session.check(cell.identity.variant)
            found.append(cell)
        except ValueError as error:
            if cell.noted() is None:
                record_failure(cell, error, plan.models[unit.model].request.timing)
    return found


def shard(cell: Cell, unit: Unit) -> Path:
    """The journal of a cell's answers to one unit."""
    return cell.folder / "shards" / f"{unit.start:07d}-{unit.stop:07d}.jsonl"


def answers(cell: Cell, unit: Unit | None = None) -> Records:
    """What is known of a cell, whoever wrote it; a good answer is preferred to a failed one.

    Args:
        unit: leave out what was written of other rows, whose number grows with the benchmark.
    """
    found: Records = {}
    paths = sorted((cell.folder / "shards").glob("*.jsonl"))
    if unit is not None:
        paths = [path for path in paths if _overlaps(path, unit)]
    for path in [cell.journal, *paths]:
        for key, record in Journal(path).load().items():
            if key not in found or cell.lacks(found[key]):
                found[key] = record
    return found


def _overlaps(path: Path, unit: Unit) -> bool:
    start, stop = (int(text) for text in path.stem.split("-"))
    return start < unit.stop and unit.start < stop


# -- scores -----------------------------------------------------------------------------------------------------------


def _score_any(plan: SweepPlan, stop: Stop, hooks: Hooks, report: Report) -> tuple[bool, bool]:
    """(anything done, anything that is not whole yet, or held by others)."""
    taken = waiting = False
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
                        _score(model, benchmark, cell, hooks)
                except JournalHeld:  # `ivcp eval` is at the same cell, or another worker still scores it
                    waiting = True
                    continue
                report.scored += 1
                taken = True
    return taken, waiting


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


def _score(model: ModelPlan, benchmark: Benchmark, cell: Cell, hooks: Hooks) -> None:
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
    hooks.say(
        f"scored {cell.identity.variant.name} on {benchmark.name}: {record['status']} {record['reason']}".rstrip()
    )
    if record["status"] == "ok":
        shutil.rmtree(cell.folder / "shards", ignore_errors=True)


def reopen(plan: SweepPlan, failures: bool = False) -> int:
    """Make units open again whose answers are gone (somebody removed their folder); returns how much was opened.

    Args:
        failures: also everything that failed, units and cells.
    """
    count = 0
    if failures:
        shutil.rmtree(plan.state / "lost", ignore_errors=True)
        for _, _, cell in plan.scored():
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


def devices() -> list[str]:
    """One name per GPU of this machine; empty without any."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    n = torch.cuda.device_count() if visible != "" else 0
    return [f"cuda:{i}" for i in range(n)]
