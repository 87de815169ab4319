"""Workers on this machine: one process per GPU, or one for the CPU; scoring goes on beside them without a GPU."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

from ivcp_eval.runs.planning.plan import RunPlan
from ivcp_eval.runs.progress.display import Progress
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
    count = workers or len(places) or 1
    with Stop().signals() as stop, progress:
        if count == 1:
            return not work(plan, stop, progress.hooks).stopped
        return _processes(plan, stop, progress, places, count)


def _processes(plan: RunPlan, stop: Stop, progress: Progress, places: list[str], count: int) -> bool:
    arguments = ["sweep", "work", str(spec_path(plan.state)), "--runs", str(plan.runs)]

    def start(i: int) -> subprocess.Popen[bytes]:
        device = ["--device", places[i % len(places)]] if places else []
        return _start([*arguments, *device, "--no-score", "--every", "0"], logs / f"worker-{i}.log")

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


def _start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen([sys.executable, "-m", "ivcp_eval", *arguments], stdout=stream, stderr=stream)


def _score(plan: RunPlan, stop: Stop, progress: Progress) -> Report:
    return work(plan, stop, progress.hooks, answer=False)
