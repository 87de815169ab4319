"""Workers on a Slurm cluster, started with submitit: an array of GPU tasks, then one CPU job that scores.

Slurm only starts processes; which work is left stands in the sweep's files. A task keeps one model in memory and takes
units of that model until none is left, so tasks balance themselves and a lost one costs nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ivcp_eval.runs.executors.local import MOST_RESTARTS
from ivcp_eval.runs.planning.plan import RunPlan
from ivcp_eval.runs.progress.display import Progress
from ivcp_eval.runs.records.state import mark
from ivcp_eval.runs.store.manifest import spec_path
from ivcp_eval.runs.worker import Stop

POLL_S = 5.0

MISSING = "submitit is not installed; `pip install submitit`, or start workers by hand (docs/sweeps.md, sbatch)"


@dataclass(frozen=True)
class Options:
    """What Slurm is asked for.

    Attributes:
        array_limit: most that run at once, and most tasks unless there are more models. gpus_per_task: 0 asks for
            none. minutes: time limit of a task, which is requeued while work is left. parameters: further options of
            sbatch, e.g. ``account``.
    """

    array_limit: int = 8
    partition: str = ""
    gpus_per_task: int = 1
    cpus_per_task: int = 4
    minutes: int = 24 * 60
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What one Slurm task runs; submitit stores it by reference and values, so it must stay small.

    Attributes:
        spec, runs: of the run. model: the one it keeps in memory; empty for the scoring job, which needs no GPU.
        device: of the tasks. page: HTML file that each keeps up to date; empty for none.
    """

    spec: str
    runs: str
    model: str
    device: str
    page: str = ""

    def __call__(self) -> int:
        """Work; the number of finished units or scored cells.

        Raises:
            DeviceLost: the GPU was lost; the task is requeued unless that happened often.
            RuntimeError: its model or a benchmark could not be loaded.
        """
        from ivcp_eval.runs.answering.samples import DeviceLost
        from ivcp_eval.runs.planning.plan import make
        from ivcp_eval.runs.planning.spec import load
        from ivcp_eval.runs.records.results import build
        from ivcp_eval.runs.worker import work

        with ExitStack() as stack:
            stop = stack.enter_context(Stop().signals())
            spec = load(self.spec)
            plan = make(spec, Path(self.runs), self.device, plan_only=not self.model)
            page = Path(self.page) if self.page else None
            hooks = stack.enter_context(Progress(plan, every=0, page=page)).hooks
            # Slurm counts its restarts of a task from 1 and says nothing at the first start.
            restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            hooks.say(f"start {restart} on {socket.gethostname()}")
            if self.model:
                try:
                    report = work(plan, stop, hooks, score=False, model=self.model)
                except DeviceLost:
                    if restart < MOST_RESTARTS:
                        requeue()
                    raise
                if report.broken:
                    names = ", ".join(sorted(report.broken))
                    raise RuntimeError(f"{names} could not be loaded; the reason stands in this task's log")
            else:
                report = work(plan, stop, hooks, answer=False)
        # SIGTERM may be a user's scancel, after which nothing may come back; the other two warn of a time limit.
        if stop.signal in (signal.SIGUSR1, signal.SIGUSR2):
            requeue()
        if not self.model:
            build(spec.name, Path(self.runs))
        return report.units + report.scored


def requeue() -> None:
    """Ask Slurm to run this task again; a task that Slurm itself preempts is requeued already, which is no error."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", ""))
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    subprocess.run(["scontrol", "requeue", f"{job}_{task}" if task else job], check=False)


def submit(plan: RunPlan, options: Options, device: str, page: str = "") -> tuple[list[str], str]:
    """Submit the array and the scoring job; returns (ids of the tasks, id of the scoring job).

    Args:
        device: of the tasks, and of the plan, which this machine need not have.
        page: of `Task`.

    Raises:
        ImportError: submitit is missing. RuntimeError: there is no ``sbatch`` here.
    """
    try:
        import submitit
    except ImportError as error:
        raise ImportError(MISSING) from error
    if shutil.which("sbatch") is None:
        raise RuntimeError("sbatch was not found: run this on a login node of the cluster, or use --executor local")
    logs = plan.state / "logs" / "slurm"
    spec, folder = str(spec_path(plan.state).resolve()), str(plan.runs.resolve())
    counts = shares(plan, options.array_limit)
    tasks = [Task(spec, folder, model, device, page) for model, n in counts.items() for _ in range(n)]
    common = {**({"partition": options.partition} if options.partition else {}), **options.parameters}
    jobs: list[Any] = []
    if tasks:
        executor = submitit.SlurmExecutor(folder=logs)
        executor.update_parameters(
            job_name=f"ivcp-{plan.spec.name}",
            time=options.minutes,
            array_parallelism=options.array_limit,
            cpus_per_task=options.cpus_per_task,
            **({"gpus_per_task": options.gpus_per_task, "ntasks_per_node": 1} if options.gpus_per_task else {}),
            **_split(common, {"requeue": True}),
        )
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    executor = submitit.SlurmExecutor(folder=logs)
    ids = sorted({job.job_id.partition("_")[0] for job in jobs})
    after = {"dependency": "afterany:" + ":".join(ids)} if ids else {}
    executor.update_parameters(
        job_name=f"ivcp-{plan.spec.name}-score", time=options.minutes, cpus_per_task=1, **_split(common, after)
    )
    score = executor.submit(Task(spec, folder, "", device, page))
    return [job.job_id for job in jobs], score.job_id


def wait(jobs: list[str], progress: Progress) -> bool:
    """Show progress until Slurm no longer knows any of the jobs; False if asked to stop, which leaves them at work."""
    with Stop().signals() as stop, progress:
        while not stop.requested and queued(jobs):
            time.sleep(POLL_S)
    return not stop.requested


def queued(jobs: list[str]) -> bool:
    """Whether any of them waits or runs; also if the controller does not answer, since that ends no job."""
    ids = sorted({job.partition("_")[0] for job in jobs})
    answer = subprocess.run(
        ["squeue", "-h", "-o", "%i", "-j", ",".join(ids)], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        return "Invalid job id" not in answer.stderr
    return bool(answer.stdout.strip())


def _split(given: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The partition goes by its own name, everything else as it stands to sbatch."""
    own = {key: given[key] for key in ("partition",) if key in given}
    return {**own, "additional_parameters": {**{k: v for k, v in given.items() if k not in own}, **more}}


def shares(plan: RunPlan, most: int) -> dict[str, int]:
    """Tasks for each model with work left: in proportion to it, at least one, never more than its units.

    Their sum exceeds ``most`` only where there are more models than that; no more than ``most`` run at once anyway.
    """
    units: dict[str, int] = {}
    weight: dict[str, int] = {}
    for unit in plan.units():
        pending = 0 if mark(plan, unit).exists() else len(unit.pending)
        if pending:
            units[unit.model] = units.get(unit.model, 0) + 1
            weight[unit.model] = weight.get(unit.model, 0) + pending * (unit.stop - unit.start)
    counts = dict.fromkeys(units, 1)
    while sum(counts.values()) < most:
        open_ = [model for model in counts if counts[model] < units[model]]
        if not open_:
            break
        counts[max(open_, key=lambda model: weight[model] / counts[model])] += 1  # who has most left for each task
    return counts
