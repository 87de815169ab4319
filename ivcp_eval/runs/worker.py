"""A worker: takes units of work until none is left, answers them, and has the cells that are whole scored.

Every answer is appended to a journal and flushed before the next sample, so a worker may be killed at any moment and
another goes on behind the last answer. Nothing is ever averaged over part of a cell.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.interface.failures import FAILURES
from ivcp_eval.runs.answering.batching import Fits
from ivcp_eval.runs.answering.samples import Agreement, Answered, DeviceLost, Losses, answered_samples
from ivcp_eval.runs.answering.served.endpoint import ServerLost
from ivcp_eval.runs.answering.served.samples import Served, served_samples
from ivcp_eval.runs.answering.served.times import time_served
from ivcp_eval.runs.answering.timing import is_timed, time_cells
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import RunPlan, Unit
from ivcp_eval.runs.records.scoring import record_failure, score_any
from ivcp_eval.runs.records.state import Mark, answers, lease, mark, shard
from ivcp_eval.runs.store.journal import Journal, JournalHeld
from ivcp_eval.runs.store.lease import claim, holder

if TYPE_CHECKING:
    from ivcp_eval.runs.answering.session import Session

POLL_S = 0.5


class Stop:
    """Whether the worker was asked to end; it then finishes the sample at hand, so nothing is lost or cut short."""

    def __init__(self) -> None:
        self.requested = False
        self.signal: int | None = None

    @contextmanager
    def signals(self) -> Iterator[Stop]:
        """Listen to SIGTERM, SIGUSR1 and SIGUSR2, which clusters send before they preempt or end a job."""
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        before = {number: signal.signal(number, self._ask) for number in signals}
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
        broken: models and benchmarks that could not be loaded. held: what is said of journals that others write.
    """

    units: int = 0
    samples: int = 0
    scored: int = 0
    failed: int = 0
    stopped: bool = False
    broken: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set, repr=False)
    sessions: dict[str, Any] = field(default_factory=dict, repr=False)
    servers: dict[str, Served] = field(default_factory=dict, repr=False)
    dataset: tuple[Any, Any] = field(default=(None, None), repr=False)


@dataclass(frozen=True)
class Hooks:
    """What a worker tells, in lines; how far it is stands in its journals (`watch.py`).

    Attributes:
        say: what was done. warn: what went wrong.
    """

    say: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None


class _NotLoadedError(RuntimeError):
    """A model or a benchmark of the plan."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name
        super().__init__(f"{name} could not be loaded, so nothing of it is answered: {type(error).__name__}: {error}")


def work(
    plan: RunPlan,
    stop: Stop,
    hooks: Hooks,
    answer: bool = True,
    score: bool = True,
    model: str = "",
    measure_time: bool = True,
) -> Report:
    """Take what is left of a run until nothing is, or until asked to stop.

    Args:
        answer, score: which kinds of work; scoring needs no GPU. model: only units of this model.
        measure_time: time samples of what is answered; False where others are at work on the same device.

    Raises:
        DiskFullError: nothing half-written is left; run again when there is space. DeviceLost: this process can answer
            nothing more; another one can.
    """
    report = Report()
    waited_for: set[str] = set()
    while not stop.requested:
        left = busy = False
        if answer:
            taken, waiting = _answer_any(plan, stop, hooks, report, model)
            left, busy = left or taken, busy or waiting
        if answer and measure_time and not left and not stop.requested:
            left = _time_any(plan, stop, hooks, report, model)
        if score and not stop.requested:
            scored, waiting = score_any(plan, stop, hooks.say)
            report.scored += scored
            left, busy = left or scored > 0, busy or waiting
        if not left and not busy:
            break
        if not left:
            # Others hold what is left; should they die, it is taken over.
            claims = (plan.state / "leases").glob("*.lease") if answer else ()
            holders = report.held | {f"waiting for {who}" for path in claims if (who := holder(path))}
            for who in sorted(holders - waited_for):
                hooks.say(who)
            waited_for |= holders
            time.sleep(POLL_S)
    report.stopped = stop.requested
    report.sessions.clear()
    report.dataset = None, None
    return report


def _answer_any(plan: RunPlan, stop: Stop, hooks: Hooks, report: Report, model: str) -> tuple[bool, bool]:
    """(anything done, anything held by others)."""
    taken = waiting = False
    for unit in plan.units():
        if stop.requested:
            break
        if (model and unit.model != model) or {_engine_name(plan, unit), unit.benchmark.name} & report.broken:
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
                except JournalHeld as error:  # a worker that lost its claim is still writing its last sample
                    report.held.add(str(error))
                    waiting = True
                except ServerLost as error:
                    report.broken.add(_engine_name(plan, unit))
                    hooks.warn(f"{unit.model} on {unit.benchmark.name}: {error}. Run again to go on")
                except _NotLoadedError as error:  # which ends no work on others
                    report.broken.add(error.name)
                    hooks.warn(str(error))
    return taken, waiting


def _answer(plan: RunPlan, unit: Unit, stop: Stop, hooks: Hooks, report: Report) -> None:
    engine, dataset = _engine(plan, unit, hooks, report), _dataset(plan, unit, report)
    cells = _runnable(plan, engine, unit)
    for cell in cells:
        if cell.load_record() is not None:
            cell.record.unlink(missing_ok=True)  # of another sweep or `ivcp eval`, incomplete; it is scored anew
        if isinstance(engine, Served):
            cell.note()
        else:
            cell.note(asdict(engine.shape), engine.text_config.to_dict())
    losses = Losses(plan.state / "lost" / f"{unit.name}.json")
    fits = Fits(_fits(plan, f"{_loaded_name(plan, unit)}.{unit.benchmark.name}"))
    start = time.monotonic()
    with ExitStack() as stack:
        journals = [stack.enter_context(Journal(shard(cell, unit)).open()) for cell in cells]
        known = [answers(cell, unit) for cell in cells]
        answered = failed = 0
        agreement = Agreement()

        def keep(sample: Answered) -> None:
            key, records = sample
            for cell, journal, before, record in zip(cells, journals, known, records, strict=True):
                if record is not None and record is not before.get(key) and cell.needs_answer(before.get(key)):
                    journal.append(key, record)
                    before[key] = record

        made: Iterator[Answered]
        if not isinstance(engine, Served):
            made = answered_samples(plan, unit, engine, dataset, cells, known, losses, agreement, fits)
        else:
            made = served_samples(unit, engine, dataset, cells, known)
        stack.callback(made.close)  # type: ignore[attr-defined]  # requests that are under way are dropped
        try:
            for key, records in made:
                if not records:  # its picture cannot be read; `run_cell` notes why
                    failed += 1
                    continue
                keep((key, records))
                answered += 1
                failed += any(before[key].error for before in known)
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
    compared = asdict(agreement)
    Mark(unit.stop - unit.start, answered, failed, time.monotonic() - start, **compared).write(mark(plan, unit))
    report.units += 1
    hooks.say(
        f"{unit.model} on {unit.benchmark.name}, rows {unit.start}-{unit.stop}: {answered} answered, {failed} failed"
    )


def _time_any(plan: RunPlan, stop: Stop, hooks: Hooks, report: Report, only: str) -> bool:
    """Time samples of the benchmarks that are answered and were not timed yet; whether there were any."""
    if not plan.options.timing:
        return False
    timed = False
    open_ = {
        (unit.model, unit.benchmark.name) for unit in plan.units() if unit.pending and not mark(plan, unit).exists()
    }
    for name, model in plan.models.items():
        for benchmark, group in model.groups.values():
            cells = model.timed(group)
            if stop.requested or (name, benchmark.name) in open_ or {name, benchmark.name} & report.broken:
                continue
            if (only and name != only) or all(is_timed(cell, plan.options.timing) for cell in cells):
                continue
            task = f"time.{name}.{benchmark.name}"
            if task in report.broken:
                continue
            with claim(lease(plan, task)) as mine:
                if mine and not all(is_timed(cell, plan.options.timing) for cell in cells):
                    try:
                        n = _time(plan, name, benchmark, cells, hooks, report)
                    except ServerLost as error:
                        report.broken.add(task)
                        hooks.warn(f"{name} on {benchmark.name} is not timed: {error}. Run again to time it")
                        continue
                    hooks.say(f"timed {n} samples of {benchmark.name} under every variant of {name}")
                    timed = True
    return timed


def _time(plan: RunPlan, model: str, benchmark: Benchmark, cells: Sequence[Cell], hooks: Hooks, report: Report) -> int:
    """Time a benchmark's cells: those of the model in memory side by side, and those of servers; how many samples."""
    n, samples, placement = 0, plan.options.timing, plan.models[model].placement
    here = tuple(cell for cell in cells if cell.identity.variant.server is None)
    whole = Unit(model, benchmark, 0, 0, here, placement)
    dataset = _dataset(plan, whole, report)
    if here:
        session = _session(plan, whole, hooks, report)
        n = time_cells(session, dataset, _capable(session, here), samples)
    engines, served = [], []
    for cell in cells:
        if cell not in here:
            engine = _served(plan, Unit(model, benchmark, 0, 0, (cell,), placement), report)
            with suppress(ValueError):
                engine.check(benchmark.kind == "grounding")
                engines.append(engine)
                served.append(cell)
    return max(n, time_served(engines, dataset, served, samples))


def _capable(session: Session, cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose method works on the model; the others' records say why not."""
    capable = []
    for cell in cells:
        with suppress(ValueError):
            session.check(cell.identity.variant)
            capable.append(cell)
    return capable


def _engine_name(plan: RunPlan, unit: Unit) -> str:
    return _loaded_name(plan, unit) if unit.server is None else unit.server.base_url


def _engine(plan: RunPlan, unit: Unit, hooks: Hooks, report: Report) -> Session | Served:
    """Who answers a unit."""
    return _session(plan, unit, hooks, report) if unit.server is None else _served(plan, unit, report)


def _served(plan: RunPlan, unit: Unit, report: Report) -> Served:
    """The server of a unit's one cell; what it said of itself is kept."""
    from ivcp_eval.vlmeval_bridge import register

    (cell,) = unit.cells
    if cell.identity.hash not in report.servers:
        register()
        report.servers[cell.identity.hash] = Served(plan.models[unit.model], cell, plan.options.timeout)
    return report.servers[cell.identity.hash]


def _loaded_name(plan: RunPlan, unit: Unit) -> str:
    """The model of a unit, with how it is loaded where that is not as for the others: ``tiny (eager, bfloat16)``."""
    usual, own = plan.models[unit.model].placement, unit.placement
    different = [(own.dtype, usual.dtype), (own.attention, usual.attention)]
    words = [mine for mine, other in different if mine != other]
    return unit.model + (f" ({', '.join(words)})" if words else "")


def _fits(plan: RunPlan, name: str) -> Path:
    """Where it is remembered what fits into memory together."""
    return plan.state / "fits" / f"{name}.json"


def _session(plan: RunPlan, unit: Unit, hooks: Hooks, report: Report) -> Session:
    """The unit's model in memory; one at a time."""
    from ivcp_eval.runs.answering.session import timed_load
    from ivcp_eval.vlmeval_bridge import register

    name = _loaded_name(plan, unit)
    if name not in report.sessions:
        report.sessions.clear()
        register()
        own = plan.models[unit.model]
        try:
            options = plan.options
            fits = _fits(plan, f"{name}.variants")
            loaded, seconds = timed_load(
                own.weights, unit.placement, own.limits, options.trust_remote_code, options.timeout, fits
            )
        except FAILURES as error:
            raise _NotLoadedError(name, error) from error
        report.sessions[name] = loaded
        hooks.say(f"loaded {name} in {seconds:.1f} s")
    session: Session = report.sessions[name]
    return session


def _dataset(plan: RunPlan, unit: Unit, report: Report) -> Any:
    """VLMEvalKit's data set; the last one is kept, since reading it takes as long as many answers."""
    from ivcp_eval.vlmeval_bridge import register

    register()  # VLMEvalKit under the name that its own modules import, also where nothing is answered before timing
    from ivcp_eval.vlmeval_bridge.evaluate import build

    key = unit.benchmark.name, plan.options.limit
    if report.dataset[0] != key:
        report.dataset = None, None  # two need not fit into memory
        try:
            report.dataset = key, build(unit.benchmark, key[1])
        except FAILURES as error:
            raise _NotLoadedError(unit.benchmark.name, error) from error
    return report.dataset[1]


def _runnable(plan: RunPlan, engine: Session | Served, unit: Unit) -> list[Cell]:
    """The unit's unfinished cells whose method works on the model; the others are recorded with the reason."""
    runnable = []
    for cell in unit.pending:
        try:
            if isinstance(engine, Served):
                engine.check(unit.benchmark.kind == "grounding")
            else:
                engine.check(cell.identity.variant)
            runnable.append(cell)
        except ValueError as error:
            if plan.spec.kind == "eval":
                raise
            if cell.load_record() is None:
                record_failure(cell, error, plan.options)
    return runnable


def devices() -> list[str]:
    """One name per GPU of this machine; empty without any."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    n = torch.cuda.device_count() if visible != "" else 0
    return [f"cuda:{i}" for i in range(n)]
