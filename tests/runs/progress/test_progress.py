"""What a sweep says while it runs, counted from the files of all workers: on a terminal, in a pipe, or nothing."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.files import write_json
from ivcp_eval.interface.records import Answer
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import RunPlan, Unit, make
from ivcp_eval.runs.planning.spec import load
from ivcp_eval.runs.progress import display as progress
from ivcp_eval.runs.progress import watch
from ivcp_eval.runs.progress.display import Progress
from ivcp_eval.runs.progress.watch import Watch
from ivcp_eval.runs.progress.words import benchmark_line, duration, summary
from ivcp_eval.runs.records.state import lease, mark, shard
from ivcp_eval.runs.store.journal import line_of
from ivcp_eval.runs.store.lease import claim
from tests.answers import answer as good
from tests.runs.conftest import SPEC, Bench


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plan(bench: Bench) -> RunPlan:
    return make(load(bench.spec), bench.folder / "runs")


def answer(unit: Unit, key: str, error: str = "", cells: int | None = None) -> None:
    for cell in unit.cells[:cells]:
        path = shard(cell, unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = round(100 * cell.identity.variant.ratio)
        made = Answer(error=error) if error else good(visual=100, kept=kept)
        with path.open("ab") as stream:
            stream.write(line_of(key, made))


def finish(plan: RunPlan, unit: Unit, answered: int, failed: int = 0) -> None:
    mark(plan, unit).parent.mkdir(parents=True, exist_ok=True)
    write_json(mark(plan, unit), {"samples": 3, "answered": answered, "failed": failed, "seconds": 1.0})


def score(cell: Cell, status: str = "ok") -> None:
    write_json(cell.record, {"status": status, "reason": ""})


def test_a_watch_counts_what_was_appended_by_anybody(plan: RunPlan) -> None:
    first, second = [unit for unit in plan.units() if unit.benchmark.name == "tiny_mcq"]
    answer(first, "before")
    clock = Clock()
    seen = Watch(plan, clock)
    mcq = seen.tallies["tiny", "tiny_mcq"]
    assert (mcq.samples, mcq.answered, mcq.cells, mcq.scored, mcq.working) == (5, 1, 5, 0, 0)
    assert seen.total.samples == 10
    assert seen.rate == 0
    assert seen.eta_s is None, "what was there before is no speed"
    assert mcq.kept == pytest.approx((75 + 50 + 50 + 50) / 400), "of the pruned variants"

    with claim(lease(plan, first.name)) as mine:
        assert mine
        clock.now += 4
        answer(first, "b")
        answer(first, "c", cells=2)  # the other three are being written
        seen.refresh()
        assert (mcq.answered, mcq.working) == (2, 1)
        assert seen.rate == pytest.approx(1 / 4)
        assert seen.eta_s == pytest.approx(8 * 4)
        tails = [shard(cell, first) for cell in first.cells]
        for path in tails:  # nothing is read twice: what was read may turn to noise
            path.write_bytes(b"x" * path.stat().st_size)
        clock.now += 4
        with tails[0].open("a") as stream:
            stream.write('{"key": "half')
        seen.refresh()
        assert mcq.answered == 2

    finish(plan, first, answered=2)
    clock.now += 2
    seen.refresh()
    assert (mcq.answered, mcq.working) == (3, 0)
    assert seen.rate == pytest.approx(2 / 10), "both new samples, and not the one of before"

    answer(second, "d")
    answer(second, "e", error="OutOfMemoryError: no")
    with claim(lease(plan, second.name)):
        seen.refresh()
        assert (mcq.answered, mcq.failed) == (4, 1), "a failed sample is not answered ..."
    finish(plan, second, answered=2, failed=1)
    for cell in first.cells:
        score(cell, "incomplete" if cell.identity.variant.method == "fastv" else "ok")
    seen.refresh()
    assert (mcq.answered, mcq.failed, mcq.scored, mcq.broken) == (5, 1, 5, 1), "... until its unit is done"
    assert mcq.complete
    assert "5/10 cells scored, 1 of them not whole, 0 at work" in summary(seen)
    assert not seen.total.complete

    mark(plan, second).unlink()  # --retry-failed
    first.cells[3].record.unlink()
    seen.refresh()
    assert (mcq.answered, mcq.failed, mcq.scored) == (4, 1, 4)


def test_speed_is_that_of_the_last_while(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "WINDOW_SAMPLES", 2)
    clock = Clock()
    seen = Watch(plan, clock)
    clock.now += 1000  # loading a model
    seen.refresh()
    keys = iter("abcdefghijklmnop")
    units = [unit for unit in plan.units() if unit.stop - unit.start == 3]
    for unit, seconds in zip(units, (10, 100), strict=True):
        with claim(lease(plan, unit.name)):
            for _ in range(3):
                clock.now += seconds
                answer(unit, next(keys))
                seen.refresh()
    assert seen.rate == pytest.approx(1 / 100), "not of the fast ones before, nor of the load"
    assert f"{seen.rate:.2f} samples/s" in summary(seen)


def test_a_new_worker_s_unit_that_is_over_between_two_looks_counts(plan: RunPlan) -> None:
    clock = Clock()
    seen = Watch(plan, clock)
    unit = plan.units()[0]
    clock.now += 5
    finish(plan, unit, answered=3)
    seen.refresh()
    assert seen.total.answered == 3
    assert seen.rate == pytest.approx(3 / 5)


def test_the_words(plan: RunPlan) -> None:
    clock = Clock()
    seen = Watch(plan, clock)
    unit = plan.units()[0]
    with claim(lease(plan, unit.name)):
        clock.now += 10
        answer(unit, "a")
        answer(unit, "b", error="no")
        seen.refresh()
        tally = seen.tallies[unit.model, unit.benchmark.name]
        assert (
            benchmark_line(tally) == f"tiny on {unit.benchmark.name}: 1/5 samples, 1 failed, 56% of visual tokens kept"
        )
        assert summary(seen) == (
            "0.10 samples/s, 90 s left, 56% of visual tokens kept, 1 failed, 0/10 cells scored, 1 at work"
        ).replace("90 s", duration(90))
    assert [duration(s) for s in (3, 89, 600, 7200)] == ["3 s", "89 s", "10 min", "2.0 h"]


def test_silence_and_plain_lines_in_this_process(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "REFRESH_S", 0.01)
    with Progress(plan, quiet=True) as silent:
        silent.hooks.say("never")
        time.sleep(0.05)
    assert capsys.readouterr().out == ""
    out = io.StringIO()
    with Progress(plan, every=0.02, stream=out) as lines:
        end = time.monotonic() + 20
        while out.getvalue().count("0/10 samples") < 3 and time.monotonic() < end:
            time.sleep(0.01)
        lines.say("a line")
        assert not lines.complete
    assert out.getvalue().count("0/10 samples, 0/10 cells scored, 0 at work\n") >= 4, "every so often, and at the end"
    assert "a line\n" in out.getvalue()
    out = io.StringIO()
    with Progress(plan, every=0, stream=out) as lines:
        lines.say("a line")
    assert out.getvalue() == "a line\n", "a worker's log holds events only"


# -- real sweeps of two workers ---------------------------------------------------------------------------------------


def command(bench: Bench, *more: str) -> list[str]:
    return [sys.executable, "-m", "ivcp_eval", *bench.arguments("run", "--workers", "2", *more)]


def through_terminal(arguments: list[str], columns: int = 160) -> tuple[int, str]:
    """(exit code, everything written) of a command whose output is a terminal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(arguments, stdout=its, stderr=its)
    os.close(its)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    return process.wait(), b"".join(chunks).decode(errors="replace")


@pytest.fixture
def longer(bench: Bench, random_model: Path) -> Bench:
    bench.spec.write_text(SPEC.format(model=random_model, limit=8))
    return bench


@pytest.mark.slow
def test_two_workers_through_a_terminal(longer: Bench) -> None:
    code, text = through_terminal(command(longer))
    assert code == 0, text
    overall = [int(n) for n in re.findall(r"small: [^\r\n]*?(\d+)/16 ", text)]
    assert overall[-1] == 16
    assert set(overall) - {0, 16}, "it moves while the workers work"
    for name in ("tiny_mcq", "tiny_yes_no"):
        assert re.search(rf"  tiny on {name}: [^\r\n]*/8 ", text), "a bar of its own while it is worked on"
        assert f"tiny on {name}: 8/8 samples" in text
    assert re.search(r"\d+\.\d\d samples/s, \d+ (s|min) left, \d+% of visual tokens kept", text)
    assert "2 at work" in text
    assert "10/10 cells scored" in text
    assert "it/s]" not in text, "VLMEvalKit's bars go to a log"
    assert "it/s]" in (longer.folder / "sweeps/small/logs/scoring.log").read_text()
    assert "loaded tiny" in (longer.folder / "sweeps/small/logs/worker-0.log").read_text()


@pytest.mark.slow
def test_two_workers_through_a_pipe(longer: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(command(longer, "--every", "0.5"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout
    overall = [int(n) for n in re.findall(r"^(\d+)/16 samples", done.stdout, re.M)]
    assert overall == sorted(overall)
    assert overall[-1] == 16
    assert set(overall) - {0, 16}
    assert re.search(r"^  tiny on tiny_\w+: \d+/8 samples, \d+% of visual tokens kept$", done.stdout, re.M)
    assert re.search(r"\d+\.\d\d samples/s, \d+ (s|min) left", done.stdout)
    assert "2 at work" in done.stdout
    table = done.stdout.index("\nmodel tiny\n")
    assert done.stdout.rindex("10/10 cells scored") < table
    capfd.readouterr()
    assert longer.call("run", "--quiet") == 0
    assert capfd.readouterr().out == done.stdout[table:], "results alone"


@pytest.mark.slow
def test_a_sweep_is_followed_from_elsewhere(bench: Bench) -> None:
    arguments = bench.arguments("status", "--follow", "--every", "0.2")
    follower = subprocess.Popen([sys.executable, "-m", "ivcp_eval", *arguments], stdout=subprocess.PIPE, text=True)
    assert bench.call("run", "--quiet") == 0
    out: Any = follower.communicate(timeout=300)[0]
    assert follower.returncode == 0
    assert "10/10 samples" in out
    assert "0 samples left" in out, "the status at the end"
