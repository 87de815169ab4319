"""Workers on this machine: one process per GPU, or one for the CPU; scoring goes on beside them without a GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ivcp_eval.runs.answering.cpu import cpu_workers
from ivcp_eval.runs.planning.plan import RunPlan, Unit
from ivcp_eval.runs.progress.display import Progress
from ivcp_eval.runs.records.state import mark
from ivcp_eval.runs.store.manifest import spec_path
from ivcp_eval.runs.worker import Report, Stop, devices, work

LOST = 76  # exit code of a worker that lost its GPU; a new process may go on with it
MOST_RESTARTS = 10  # of one worker, or a broken GPU would go through all samples


def run(plan: RunPlan, workers: int, progress: Progress, device: str = "") -> bool:
    """Work until nothing is left; True if nobody asked it to stop.

    Args:
        plan: its manifest is written, since further processes read it. workers: processes; 0 takes one per GPU, or one.
        progress: shows what all of them do. device: of every process; empty gives each a GPU of its own.

    Raises:
        DeviceLost: it was at work in this process, which cannot go on; a new one can.
    """
    places = [device] * bool(device) or devices()
    on_cpu = not places or places[0] == "cpu"
    count, threads = (workers or len(places), 0) if not on_cpu else _cpu_share(plan, workers)
    with Stop().signals() as stop, progress:
        if count > 1:
            done = _processes(plan, stop, progress, places, count, threads)
            if not done or not on_cpu or _open_units(plan):
                return done
        elif threads:
            import torch

            torch.set_num_threads(threads)
        return not work(plan, stop, progress.hooks).stopped  # with several processes, only times are left


def _open_units(plan: RunPlan) -> list[Unit]:
    return [unit for unit in plan.units() if unit.pending and not mark(plan, unit).exists()]


def _cpu_share(plan: RunPlan, workers: int) -> tuple[int, int]:
    """(processes, threads of each; 0 leaves what torch takes)."""
    if workers:
        return workers, 0
    units = _open_units(plan)
    answers = sum((unit.stop - unit.start) * len(unit.pending) for unit in units)
    weights = max(
        (path.stat().st_size for model in plan.models.values() for path in model.weights.source.glob("*.safetensors")),
        default=0,
    )
    if os.environ.get("OMP_NUM_THREADS"):  # somebody has shared out the cores already
        return 1, 0
    return cpu_workers(weights, answers)


def _processes(plan: RunPlan, stop: Stop, progress: Progress, places: list[str], count: int, threads: int = 0) -> bool:
    arguments = ["sweep", "work", str(spec_path(plan.state)), "--runs", str(plan.runs)]

    def start(i: int) -> subprocess.Popen[bytes]:
        device = ["--device", places[i % len(places)]] if places else []
        alone = ["--not-alone"] if threads else []
        page = ["--html", str(progress.page)] if progress.page else []
        return _start(
            [*arguments, *device, *alone, *page, "--no-score", "--every", "0"], logs / f"worker-{i}.log", threads
        )

    started: list[subprocess.Popen[bytes]] = []
    restarts = [0] * count
    logs = plan.state / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        for i in range(count):
            started.append(start(i))
        while any(process.poll() in (None, LOST) for process in started):
            for i, process in enumerate(started):
                if process.poll() == LOST and restarts[i] < MOST_RESTARTS and not stop.requested:
                    restarts[i] += 1
                    progress.warn(f"worker {i} lost its GPU and is started again; see {logs / f'worker-{i}.log'}")
                    started[i] = start(i)
            if all(process.poll() is not None for process in started):
                break
            _score(plan, stop, progress)
            if stop.requested:
                for process in started:
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(signal.SIGTERM)
                break
            time.sleep(1)
        codes = [process.wait() for process in started]
        report = _score(plan, stop, progress)
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
    for i, code in enumerate(codes):
        if code and not stop.requested:
            progress.warn(f"worker {i} ended with {code}; see {logs / f'worker-{i}.log'}")
    return not report.stopped


def _start(arguments: list[str], log: Path, threads: int = 0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, "-m", "ivcp_eval", *arguments]
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)


def _score(plan: RunPlan, stop: Stop, progress: Progress) -> Report:
    return work(plan, stop, progress.hooks, answer=False)
