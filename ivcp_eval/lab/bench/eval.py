"""``ivcp bench eval``: VLMEvalKit's loop with one answer after the other against the runner, on the embedded model.

Every benchmark is answered by all arms in turn before the next one is, in worker processes that are loaded beforehand,
so that a busy machine slows all of them alike; what counts is the ratio. Times are from the request to the last answer
in its journal: prompts, pictures, model and journal, no imports and no weights.

Torch adds in another order with another number of threads or rows of a batch, which decides a near tie of two tokens
differently: answers unlike the first arm's are counted, and more than one in a hundred of a benchmark's are an error.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ivcp_eval.runs.planning.numbers import COUNT, SHARE

BENCHMARKS = ("tiny_mcq", "tiny_yes_no", "tiny_short", "tiny_grounding")
FASTER, DEARER, SCORING_MS = 3.0, 1.35, 0.4
OTHER_SHARE = 0.01
COLUMNS = (
    *("benchmark", "samples", "arm", "processes", "threads", "variants", "ms_per_sample", "ratio", "target", "met"),
    *("cpu_ms_per_sample", "other_answers", "note"),
)
SHOWN = {
    "benchmark": ("benchmark", "{}"),
    "samples": ("samples", "{}"),
    "arm": ("arm", "{}"),
    "ms a sample": ("ms_per_sample", "{:.2f}"),
    "loop over it": ("ratio", "{:.2f}"),
    "CPU ms a sample": ("cpu_ms_per_sample", "{:.2f}"),
    "target": ("target", "{}"),
    "met": ("met", "{}"),
    "other answers": ("other_answers", "{}"),
    "note": ("note", "{}"),
}


@dataclass(frozen=True)
class Arm:
    """One way to answer a benchmark.

    Attributes:
        runner: the runner's way; else VLMEvalKit's loop, variant after variant. variants: baseline first.
        processes, threads: of each.
    """

    name: str
    runner: bool
    variants: int
    processes: int
    threads: int


def arms(cores: int) -> tuple[Arm, ...]:
    """What is compared. A loop has one process; the faster one of its two ways is the measure of all others."""
    return (
        Arm(f"loop, 1 process x {cores} threads", False, 2, 1, cores),
        Arm("loop, 1 process x 1 thread", False, 2, 1, 1),
        Arm(f"runner, 1 process x {cores} threads", True, 2, 1, cores),
        Arm(f"runner, {cores} processes x 1 thread", True, 2, cores, 1),
        Arm(f"runner, baseline alone, {cores} processes x 1 thread", True, 1, cores, 1),
    )


# -- in the workers -------------------------------------------------------------------------------------------------


class _Worker:
    """A process's model and plan; made once by `_load`."""

    def __init__(self, folder: Path, samples: int | None, ratio: float) -> None:
        from ivcp_eval.runs.answering.session import Session
        from ivcp_eval.runs.planning.plan import make
        from ivcp_eval.runs.planning.spec import check
        from ivcp_eval.vlmeval_bridge import register

        register()
        raw = {
            "models": ["tiny"],
            "benchmarks": list(BENCHMARKS),
            "methods": [{"method": "ivc_prune", "ratios": [ratio]}],
            "controls": [],
            "timing": 0,
            "device": "cpu",
            "limit": samples,
        }
        self.plan = make(check(raw, "bench"), folder / "runs")
        self.model = self.plan.models["tiny"]
        self.session = Session(self.model.weights, self.model.placement, self.model.limits)
        self.datasets: dict[str, Any] = {}

    def dataset(self, name: str) -> Any:
        """VLMEvalKit's, read once."""
        from ivcp_eval.vlmeval_bridge.evaluate import build

        if name not in self.datasets:
            self.datasets[name] = build(self.model.groups[name][0], self.plan.options.limit)
        return self.datasets[name]


_WORKERS: list[_Worker] = []


def _load(folder: Path, samples: int | None, ratio: float) -> None:
    _WORKERS.append(_Worker(folder, samples, ratio))


def _rows(name: str) -> int:
    return len(_WORKERS[0].dataset(name).data)


Answers = list[dict[str, str]]  # per variant: key -> text that is scored


@dataclass(frozen=True)
class Spent:
    """Seconds of one arm: elapsed, and of processor time in all of its processes and threads."""

    elapsed: float
    cpu: float


def _on_clock(way: Callable[..., Answers], *arguments: Any) -> tuple[Answers, float]:
    """What a function returns, and the processor time it took."""
    start = time.process_time()
    return way(*arguments), time.process_time() - start


def _loop(name: str, folder: Path, start: int, stop: int, variants: int, threads: int) -> Answers:
    """Rows of one benchmark through VLMEvalKit's loop, one variant after the other."""
    import torch

    from ivcp_eval.runs.answering.live import live_model
    from ivcp_eval.runs.store.journal import Journal
    from ivcp_eval.vlmeval_bridge.evaluate import infer

    worker = _WORKERS[0]
    torch.set_num_threads(threads)
    dataset, answers = worker.dataset(name), []
    whole = dataset.data
    dataset.data = whole.iloc[start:stop]
    try:
        for i, cell in enumerate(worker.model.groups[name][1][:variants]):
            with Journal(folder / f"{i}.jsonl").open() as journal:
                infer(dataset, live_model(worker.session, cell.identity.variant, journal), folder / "work", ())
                answers.append({key: answer.scored for key, answer in journal.records.items()})
    finally:
        dataset.data = whole
    return answers


def _pass(name: str, folder: Path, start: int, stop: int, variants: int, threads: int) -> Answers:
    """The same rows as the runner answers them."""
    import torch

    from ivcp_eval.runs.answering.samples import Agreement, Losses, answered_samples
    from ivcp_eval.runs.planning.plan import Unit
    from ivcp_eval.runs.store.journal import Journal

    worker = _WORKERS[0]
    torch.set_num_threads(threads)
    benchmark, cells = worker.model.groups[name]
    cells = cells[:variants]
    unit = Unit("tiny", benchmark, start, stop, cells, worker.model.placement)
    known: list[dict[str, Any]] = [{} for _ in cells]
    with ExitStack() as stack:
        journals = [stack.enter_context(Journal(folder / f"{i}.jsonl").open()) for i in range(len(cells))]
        found = answered_samples(
            *(worker.plan, unit, worker.session, worker.dataset(name), list(cells), known),
            *(Losses(folder / "lost.json"), Agreement()),
        )
        for key, answers in found:
            for journal, answer in zip(journals, answers, strict=True):
                assert answer is not None
                journal.append(key, answer)
        return [{key: answer.scored for key, answer in journal.records.items()} for journal in journals]


def _score(name: str, folders: Sequence[Path]) -> tuple[float, float]:
    """Milliseconds a sample of scoring the baseline's answers: (our own part, VLMEvalKit's evaluator).

    Args:
        folders: whose journals hold the answers.
    """
    from ivcp_eval.engine.cost.clock import call_time
    from ivcp_eval.runs.records.scoring import score_answers
    from ivcp_eval.runs.store.journal import Journal

    worker = _WORKERS[0]
    benchmark, (cell, *_) = worker.model.groups[name]
    with Journal(cell.journal).open() as journal:
        for folder in folders:
            for key, answer in Journal(folder / "0.jsonl").load().items():
                journal.append(key, answer)
    dataset, times = copy.copy(worker.dataset(name)), []
    with call_time(worker.session.model) as evaluator:
        dataset.evaluate = evaluator.around(dataset.evaluate)
        for _ in range(4):  # the first is warm-up
            start = time.perf_counter()
            with Journal(cell.journal).open() as journal:
                score_answers(worker.plan.options, worker.session.adapter, benchmark, cell, journal, dataset, None)
            times.append(1e3 * (time.perf_counter() - start))
    pairs = [(total - theirs, theirs) for total, theirs in zip(times[1:], evaluator.ms[1:], strict=True)]
    own, theirs = min(pairs)
    return own / len(dataset.data), theirs / len(dataset.data)


# -- measuring ------------------------------------------------------------------------------------------------------


class Pool:
    """Loaded worker processes that are spoken to one by one."""

    def __init__(self, workers: Sequence[ProcessPoolExecutor]) -> None:
        self.workers = workers

    @classmethod
    @contextmanager
    def open(cls, count: int, folder: Path, samples: int | None, ratio: float) -> Iterator[Pool]:
        """Start ``count`` of them, each with its model in memory."""
        context = multiprocessing.get_context("spawn")
        with ExitStack() as stack:
            workers = [
                ProcessPoolExecutor(1, context, initializer=_load, initargs=(folder, samples, ratio))
                for _ in range(count)
            ]
            for worker in workers:
                stack.enter_context(worker)
            yield cls(workers)

    def first(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the first process."""
        return self.workers[0].submit(function, *arguments).result()

    def run(self, arm: Arm, name: str, rows: int, folder: Path) -> tuple[Spent, Answers]:
        """Times and answers of one benchmark; the processes of an arm take equal shares of its rows."""
        bounds = [rows * i // arm.processes for i in range(arm.processes + 1)]
        way = _pass if arm.runner else _loop
        for i in range(arm.processes):
            (folder / str(i)).mkdir(parents=True)
        start = time.perf_counter()
        futures = [
            worker.submit(_on_clock, way, name, folder / str(i), bounds[i], bounds[i + 1], arm.variants, arm.threads)
            for i, worker in enumerate(self.workers[: arm.processes])
        ]
        done = [future.result() for future in futures]
        spent = Spent(time.perf_counter() - start, sum(cpu for _, cpu in done))
        parts = [answers for answers, _ in done]
        return spent, [{k: v for part in parts for k, v in part[i].items()} for i in range(arm.variants)]


def measure(pool: Pool, chosen: Sequence[Arm], names: Sequence[str], folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows of one benchmark after the other, and of all together; see `COLUMNS`.

    Raises:
        AssertionError: an arm gave more than `OTHER_SHARE` of a benchmark's answers otherwise than the first.
    """
    spent: dict[Arm, list[Spent]] = {arm: [] for arm in chosen}
    scorings, total, others = [], 0, Counter[Arm]()
    for arm in chosen:  # the first call of everything is warm-up
        pool.run(arm, names[0], 2, folder / "warm" / arm.name)
    for turn, name in enumerate(names):
        rows = pool.first(_rows, name)
        total += rows
        scored = {}
        for arm in chosen if turn % 2 == 0 else reversed(chosen):
            taken, scored[arm] = pool.run(arm, name, rows, folder / name / arm.name)
            spent[arm].append(taken)
        other = {arm: _differing(scored[arm], scored[chosen[0]]) for arm in chosen}
        for arm, count in other.items():
            assert count <= OTHER_SHARE * rows * arm.variants, f"{arm.name} answers {count} of {name} otherwise"
        others.update(other)
        last = next(arm for arm in reversed(chosen) if arm.runner)
        scorings.append(pool.first(_score, name, [folder / name / last.name / str(i) for i in range(last.processes)]))
        times = {arm: spent[arm][-1] for arm in chosen}
        yield [*_rows_of(name, rows, times, other), _scoring(name, rows, scorings[-1])]
    whole = {arm: Spent(sum(s.elapsed for s in some), sum(s.cpu for s in some)) for arm, some in spent.items()}
    yield [*_targets(_rows_of("all", total, whole, others), whole), _scoring("all", total, max(scorings), True)]


def _differing(answers: Answers, first: Answers) -> int:
    """Answers of any variant that are not the first arm's."""
    return sum(own[key] != theirs[key] for own, theirs in zip(answers, first, strict=False) for key in own)


def _rows_of(name: str, samples: int, times: Mapping[Arm, Spent], others: Mapping[Arm, int]) -> list[dict[str, Any]]:
    first = min(spent.elapsed for arm, spent in times.items() if not arm.runner)
    return [
        {
            **{"benchmark": name, "samples": samples, "arm": arm.name, "processes": arm.processes},
            **{"threads": arm.threads, "variants": arm.variants, "ms_per_sample": 1e3 * spent.elapsed / samples},
            **{"cpu_ms_per_sample": 1e3 * spent.cpu / samples, "ratio": first / spent.elapsed},
            "other_answers": others[arm],
        }
        for arm, spent in times.items()
    ]


def _scoring(name: str, samples: int, ms: tuple[float, float], slowest: bool = False) -> dict[str, Any]:
    own, theirs = ms
    note = f"beside {theirs:.2f} ms of VLMEvalKit's evaluator"
    row = {"benchmark": name, "samples": samples, "arm": "scoring stored answers", "ms_per_sample": own, "note": note}
    return {**row, "target": f"<= {SCORING_MS} ms", "met": own <= SCORING_MS} if slowest else row


def _targets(rows: list[dict[str, Any]], times: Mapping[Arm, Spent]) -> list[dict[str, Any]]:
    """With what was to be reached: the fastest way of the runner, and two variants against one in the same layout."""
    by_arm = dict(zip(times, rows, strict=True))
    both = {arm: spent.elapsed for arm, spent in times.items() if arm.runner and arm.variants == 2}
    best = min(both, key=lambda arm: both[arm])
    faster = by_arm[best]["ratio"]
    by_arm[best] |= {"target": f">= {FASTER}", "met": faster >= FASTER, "note": "the fastest layout"}
    for arm, spent in times.items():
        twin = next((a for a in both if (a.processes, a.threads) == (arm.processes, arm.threads)), None)
        if arm.variants == 1 and twin is not None:
            dearer = both[twin] / spent.elapsed
            note = f"baseline and variant take {dearer:.2f} times this"
            by_arm[arm] |= {"target": f"<= {DEARER}", "met": dearer <= DEARER, "note": note}
    return rows


def parser() -> argparse.ArgumentParser:
    """Arguments of the bench."""
    parser = argparse.ArgumentParser(prog="ivcp bench eval", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=COUNT, help="first samples of each benchmark only; default: all")
    parser.add_argument("--data", nargs="+", default=BENCHMARKS, choices=BENCHMARKS, help="default: all four")
    parser.add_argument("--ratio", type=SHARE, default=0.5, help="of ivc_prune (default: %(default)s)")
    parser.add_argument("--cores", type=COUNT, default=2, help="threads or processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write OUT.csv and OUT.json, and what it was measured on")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; 0, or 1 if ``--check`` found a missed target."""
    options = parser().parse_args(arguments)
    from ivcp_eval.lab.bench.report import Report, environment

    command = shlex.join(["ivcp", "bench", "eval", *(sys.argv[1:] if arguments is None else arguments)])
    report = Report(options.out, environment("cpu", command), sys.stdout, COLUMNS, SHOWN)
    with TemporaryDirectory() as name:
        folder = Path(name)
        with Pool.open(options.cores, folder, options.samples, options.ratio) as pool:
            for rows in measure(pool, arms(options.cores), options.data, folder):
                report.add(rows)
    report.finish(environment("cpu", command))
    return 1 if options.check and report.missed else 0
