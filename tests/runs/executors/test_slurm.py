"""A sweep on a real Slurm: an array of workers of which one is killed and one is requeued twice, then scoring."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ivcp_eval.runs.executors.slurm import shares
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import load
from tests.runs.conftest import SPEC, Bench
from tests.runs.executors import cluster

ROOT = Path(__file__).parents[3]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    reason = cluster.available()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    with cluster.slurm(folder) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield


def command(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def states() -> dict[str, str]:
    """Job or task id -> state of everything in the queue."""
    lines = command("squeue", "-h", "-r", "-o", "%i %T").splitlines()
    return dict(line.split() for line in lines)


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s; the queue: {states()}"
        time.sleep(0.1)


def log_of(there: Bench, task: str) -> str:
    """Everything a task wrote, at all its starts."""
    (path,) = there.folder.glob(f"sweeps/small/logs/slurm/{task}_*_log.out")
    return path.read_text()


def workers(there: Bench, task: str) -> list[int]:
    """Processes of a task that hold a claim."""
    wanted, found = f"SLURM_ARRAY_TASK_ID={task.partition('_')[2]}".encode(), []
    for path in there.folder.glob("sweeps/small/leases/*.lease"):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # given back, or being written
            pid = int(json.loads(path.read_text())["pid"])
            found += [pid] * (wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return found


def restarts(task: str) -> int:
    """By Slurm's own count, which it keeps for some minutes after the task has ended."""
    found = re.search(r"Restarts=(\d+)", command("scontrol", "show", "job", task))
    assert found
    return int(found[1])


def restart_now(there: Bench, task: str, number: int) -> None:
    """Slurm holds a requeued task back for two minutes; the test does not wait for them.

    The start is read from the task's log, which stays: the task itself may end before anybody sees it run.
    """
    until(lambda: states().get(task) == "PENDING", 60, f"requeue of {task}")
    command("scontrol", "update", f"JobId={task}", "StartTime=now")
    until(lambda: f"start {number} on " in log_of(there, task), 120, f"start {number} of {task}")


@pytest.mark.slow
def test_killed_and_requeued_tasks_end_in_the_same_bytes(
    bench: Bench, random_model: Path, slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.spec.write_text(SPEC.format(model=random_model, limit=30))
    assert bench.call("run", "--quiet") == 0
    there = bench.elsewhere(bench.folder.parent / "cluster")
    capsys.readouterr()
    options = ("--gpus-per-task", "0", "--cpus-per-task", "1", "--array-limit", "2", "--partition", "main")
    assert there.call("run", "--executor", "slurm", *options, "--slurm", "comment=test") == 0
    assert "submitted 2 tasks" in capsys.readouterr().out
    tasks = sorted(task for task in states() if "_" in task)
    assert len(tasks) == 2
    (score,) = set(states()) - set(tasks)
    assert states()[score] == "PENDING", "scoring waits for the answers"
    assert "Comment=test" in command("scontrol", "show", "job", tasks[0])

    def journals() -> int:
        return sum(path.stat().st_size > 0 for path in there.folder.glob("runs/**/shards/*.jsonl"))

    until(lambda: journals() > 0, 120, "a first answer")
    until(lambda: workers(there, tasks[0]) != [], 60, "a claim of the first task")
    os.kill(workers(there, tasks[0])[0], signal.SIGKILL)  # scancel would ask politely first
    until(lambda: tasks[0] not in states(), 60, "death of a task")
    until(lambda: "start 0 on " in log_of(there, tasks[1]), 60, "start of the other")
    assert states().get(tasks[1]) == "RUNNING"
    command("scancel", "--signal=USR2", tasks[1])  # what Slurm sends before a time limit
    restart_now(there, tasks[1], 1)
    command("scontrol", "requeue", tasks[1])  # by the administrator, or a job of higher priority
    restart_now(there, tasks[1], 2)
    until(lambda: not states(), 240, "the end of all jobs")
    for task, starts in zip(tasks, (1, 3), strict=True):
        assert restarts(task) == starts - 1
        assert re.findall(r"^start (\d+) on ", log_of(there, task), re.M) == [str(n) for n in range(starts)]
    assert "loaded tiny" in log_of(there, tasks[1])
    assert "completed successfully" not in log_of(there, tasks[0])
    assert there.csv.is_file(), "the scoring job writes the results"
    assert there.results() == bench.results()
    assert there.call("status") == 0
    capsys.readouterr()
    assert there.call("run", "--executor", "slurm", *options, "--wait") == 0, "nothing left: only a scoring job"
    out = capsys.readouterr().out
    assert "submitted 0 tasks" in out
    assert "60/60 samples" in out
    assert "\nmodel tiny\n" in out, "who waits gets the tables"
    assert not states()


@pytest.mark.slow
def test_the_launcher_waits_and_shows_progress(
    bench: Bench, random_model: Path, slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--gpus-per-task", "0", "--cpus-per-task", "1", "--array-limit", "1", "--wait", "--every", "0.5")
    assert bench.call("run", "--executor", "slurm", *options) == 0
    out = capsys.readouterr().out
    overall = [int(n) for n in re.findall(r"^(\d+)/10 samples", out, re.M)]
    assert overall == sorted(overall)
    assert overall[-1] == 10
    assert "1 at work" in out
    assert re.search(r"^  tiny on tiny_\w+: \d/5 samples", out, re.M)
    assert out.index("10/10 cells scored") < out.index("\nmodel tiny\n")


def test_the_line_for_one_node_goes_on_after_its_time_and_ends_when_cancelled(
    tmp_path: Path, slurm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of docs/sweeps.md with a stand-in that ends as a sweep does when asked to."""
    (line,) = re.findall(r"^sbatch .*?\n```$", (ROOT / "docs" / "sweeps.md").read_text(), re.MULTILINE | re.DOTALL)
    sweep = tmp_path / "sweep"
    sweep.write_text(
        "#!/bin/sh\ntrap 'exit 75' USR1 TERM\ntouch begun.$SLURM_RESTART_COUNT\nwhile :; do sleep 0.1; done\n"
    )
    sweep.chmod(0o755)
    line = re.sub(r"ivcp sweep run \S+ --workers 4 --quiet", str(sweep), line.removesuffix("```"))
    line = line.replace("--gpus=4 ", "").replace("=16", "=2")
    monkeypatch.chdir(tmp_path)
    job = command("bash", "-c", line).rpartition(" ")[2]
    until(lambda: bool(list(tmp_path.glob("begun.*"))), 30, "the first start")
    command("scancel", "--signal=USR1", job)  # what Slurm sends before the time limit, to the steps as well
    until(lambda: restarts(job) == 1, 30, "the requeue")
    until(lambda: states().get(job) == "PENDING", 60, "its place in the queue")
    time.sleep(4)  # until the credential of the first start has expired
    command("scontrol", "update", f"JobId={job}", "StartTime=now")
    until(lambda: (tmp_path / "begun.1").exists(), 60, "the second start")
    command("scancel", job)
    until(lambda: job not in states(), 60, "the end")
    assert "JobState=CANCELLED" in command("scontrol", "show", "job", job)
    assert restarts(job) == 1


def test_tasks_are_shared_out_by_work(bench: Bench) -> None:
    plan = make(load(bench.spec), bench.folder / "runs")
    assert shares(plan, 8) == {"tiny": 4}, "never more tasks than units: two benchmarks of 3 + 2 samples"
    assert shares(plan, 3) == {"tiny": 3}


@pytest.mark.parametrize("missing", ["sbatch"])
def test_without_slurm_it_says_what_to_do(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert bench.call("run", "--executor", "slurm") == 2
    assert f"{missing} was not found" in capsys.readouterr().err
