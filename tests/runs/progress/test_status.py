"""What `ivcp sweep status` and `plan` say: counts, time left, cost of what is not done."""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

import pytest

from ivcp_eval.cli.running import sweep
from ivcp_eval.files import write_json
from ivcp_eval.runs import worker as work
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import load
from ivcp_eval.runs.progress import display, status
from ivcp_eval.runs.progress.watch import Watch
from ivcp_eval.runs.records.scoring import aside
from ivcp_eval.runs.records.state import lease, mark
from ivcp_eval.runs.store.lease import claim
from tests.runs.conftest import Bench


def test_running_done_failed_and_the_time_left(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make(load(bench.spec), bench.folder / "runs")
    units = plan.units()
    assert bench.call("status") == 0
    assert capsys.readouterr().out.endswith("\n10 samples left\n"), "nothing is timed yet"
    mark(plan, units[0]).parent.mkdir(parents=True)
    write_json(mark(plan, units[0]), {"samples": 3, "answered": 3, "failed": 1, "seconds": 60.0})
    with ExitStack() as stack:
        for unit in units[1:3]:
            assert stack.enter_context(claim(lease(plan, unit.name)))
        watch = Watch(plan)
        (line, other) = watch.tallies.values()
        assert (line.cells, line.scored, line.units, line.units_done, line.failed) == (5, 0, 2, 1, 1)
        assert (line.samples, line.left, line.working + other.working) == (5, 2, 2)
        assert watch.eta_s == pytest.approx(7 * 20 / 2), "seven samples, two workers"
        assert bench.call("status") == 1, "a sample failed"
        assert "7 samples left, about 70 s" in capsys.readouterr().out
    assert Watch(plan).eta_s == pytest.approx(7 * 20), "as if one went on"


def test_only_what_is_not_done_costs_anything(bench: Bench) -> None:
    def cost() -> status.Cost:
        return status.cost(make(load(bench.spec), bench.folder / "runs"))

    before = cost()
    assert before.gpu_hours > 0
    assert before.disk_bytes == 10 * 5 * status.BYTES_PER_ANSWER
    assert bench.call("run", "--quiet") == 0
    after = cost()
    assert (after.gpu_hours, after.disk_bytes) == (0, 0)
    written = sum(path.stat().st_size for path in (bench.folder / "runs").rglob("*") if path.is_file())
    assert before.disk_bytes / 3 < written < before.disk_bytes * 4, "the estimate is one of this size"


def test_what_was_set_up_while_a_cell_was_scored_writes_on(bench: Bench) -> None:
    """A library's logger takes the standard error of the moment and keeps it."""
    plan = make(load(bench.spec), bench.folder / "runs")
    with aside(plan.state):
        handler = logging.StreamHandler()
        sys.stderr.write("a bar\n")
    handler.stream.write("later\n")
    handler.flush()
    assert (plan.state / "logs" / "scoring.log").read_text() == "a bar\nlater\n"


def test_another_sweep_takes_the_baselines_of_the_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.call("run", "--quiet") == 0
    asked: list[list[str]] = []
    answer_all = Session.answer_all

    def noted(self: Session, parts: Any, variants: Any, *more: Any) -> Any:
        asked.append([variant.method for variant in variants])
        return answer_all(self, parts, variants, *more)

    monkeypatch.setattr(Session, "answer_all", noted)
    other = Bench(bench.spec.with_name("other.yaml"), bench.folder, bench.lmu)
    other.spec.write_text(bench.spec.read_text().replace("method: fastv", "method: uniform"))
    assert other.call("run", "--quiet") == 0
    assert asked == [["uniform"]] * 10, "neither the baseline nor what both sweeps have is answered again"
    assert "none" in other.csv.read_text()


def test_following_ends_when_nobody_works(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "IDLE_S", 0.05)
    monkeypatch.setattr(display, "REFRESH_S", 0.02)
    plan = make(load(bench.spec), bench.folder / "runs")
    left = lease(plan, plan.units()[0].name)
    left.parent.mkdir(parents=True)
    left.write_text('{"host": "node-7", "pid": 7, "token": "x"}')
    os.utime(left, (time.time() + 86400,) * 2)  # of a machine whose clock is a day ahead
    assert bench.call("status", "--follow") == 0
    printed = capsys.readouterr().out
    assert "nobody has worked on it for 0 s; `ivcp sweep run` goes on with what is left" in printed
    assert "10 samples left" in printed


def test_a_worker_says_whom_it_waits_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make(load(bench.spec), bench.folder / "runs")
    held = lease(plan, plan.units()[0].name)
    held.parent.mkdir(parents=True)
    held.write_text('{"host": "node-7", "pid": 7, "token": "x"}')

    def sleep(seconds: float) -> None:
        if seconds == work.POLL_S:
            held.unlink(missing_ok=True)

    monkeypatch.setattr(time, "sleep", sleep)
    assert bench.call("run") == 0
    assert capsys.readouterr().out.count(f"waiting for process 7 on node-7 ({held})") == 1
