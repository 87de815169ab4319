"""A sweep answers every sample once for all variants, reuses what is finished and survives any kill."""

from __future__ import annotations

import errno
import json
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.files import DiskFullError
from ivcp_eval.reports.table import read_results, read_samples
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import load
from ivcp_eval.runs.store.journal import Journal
from ivcp_eval.runs.worker import Hooks, Stop, work
from tests.runs.conftest import Bench, Lab


def test_cells_are_those_of_single_runs_and_are_reused(
    bench: Bench, random_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    answer_all = Session.answer_all

    def counted(self: Session, parts: Any, variants: Any, *more: Any) -> Any:
        calls.append(len(variants))
        return answer_all(self, parts, variants, *more)

    monkeypatch.setattr(Session, "answer_all", counted)
    assert bench.call("run", "--quiet") == 0
    assert calls == [5] * 10, "every sample is answered once, for all variants together"
    rows = read_results(bench.csv)
    assert len(rows) == 2 * 5
    assert all(row["status"] == "ok" and row["n_samples"] == 5 for row in rows)

    lab = Lab(random_model, bench.folder)
    single = ("--data", "tiny_mcq", "tiny_yes_no", "--limit", "5", "--max-new-tokens", "5", "--ratio", "0.75")
    capsys.readouterr()
    assert lab.eval(*single) == 0
    assert "reusing 4 finished of 4 cells" in capsys.readouterr().out, "ivcp eval takes what the sweep made"

    fresh = Lab(random_model, bench.folder.parent / "single")
    assert fresh.eval(*single) == 0
    for row in fresh.rows():
        twin = next(r for r in rows if all(r[k] == row[k] for k in ("benchmark", "metric", "method", "ratio_asked")))
        assert twin["run_id"] == row["run_id"]
        mine = read_samples(bench.csv.parent / twin["predictions"])
        assert mine == read_samples(fresh.csv.parent / row["predictions"]), "the same answers as one by one"

    before, n = bench.results(), len(calls)
    bench.spec.write_text(bench.spec.read_text().replace("shard: 3", "shard: 2"))
    assert bench.call("run", "--quiet") == 0
    assert len(calls) == n, "other shards, the same cells: nothing runs again"
    assert bench.results() == before
    assert bench.call("results") == 0
    assert bench.results() == before


def test_a_failing_variant_fails_alone_and_is_retried(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_all = Session.answer_all
    state = {"fail": True, "n": 0}

    def failing(self: Session, parts: Any, variants: Any, *more: Any) -> Any:
        state["n"] += len(variants) > 1
        if state["fail"] and state["n"] == 2 and any(v.method == "fastv" for v in variants):
            raise RuntimeError("a kernel gave up")
        return answer_all(self, parts, variants, *more)

    monkeypatch.setattr(Session, "answer_all", failing)
    assert bench.call("run", "--quiet") == 1
    rows = read_results(bench.csv)
    bad = [row for row in rows if row["status"] != "ok"]
    assert [(row["method"], row["status"], row["n_failed"]) for row in bad] == [("fastv", "incomplete", 1)]
    assert "a kernel gave up" in bad[0]["reason"]
    table = next(bench.csv.with_suffix("").glob("*.md")).read_text()
    row = next(line for line in table.splitlines() if "fastv" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == ["-", "-", "-", "0.0", "-"], "no cost, no score where it failed, no average"
    (journal,) = bench.folder.glob("runs/tiny/tiny_mcq/fastv-*/journal.jsonl")
    assert "Traceback" in next(r for r in Journal(journal).load().values() if r.error).traceback

    capsys.readouterr()
    assert bench.call("status") == 1
    assert "a kernel gave up" in capsys.readouterr().out
    state["fail"] = False
    assert bench.call("run", "--quiet") == 1, "without --retry-failed it stays as it is"
    assert bench.call("run", "--quiet", "--retry-failed") == 0
    assert all(row["status"] == "ok" for row in read_results(bench.csv))
    clean = bench.elsewhere(bench.folder.parent / "clean")
    assert clean.call("run", "--quiet") == 0
    assert clean.results() == bench.results()


def test_batches_of_samples_change_no_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.spec.write_text(bench.spec.read_text().replace("  - {method: downsample, ratios: [0.5]}\n", ""))
    assert bench.call("run", "--quiet") == 0
    batched = bench.elsewhere(bench.folder.parent / "batched")
    bench.spec.write_text(bench.spec.read_text().replace("batch: 1", "batch: 2"))
    sizes: list[int] = []
    answer_batch = Session.answer_batch

    def counted(self: Session, conversations: Any, *more: Any) -> Any:
        sizes.append(len(conversations))
        if len(sizes) == 2:
            raise RuntimeError("too much")
        return answer_batch(self, conversations, *more)

    monkeypatch.setattr(Session, "answer_batch", counted)
    assert batched.call("run", "--quiet") == 0
    assert sizes == [2, 2, 2, 2], "units of three and two samples; the second batch went one by one"
    assert batched.results() == bench.results()


def test_plan_says_what_it_will_cost(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.call("plan") == 0
    out = capsys.readouterr().out
    assert "10 cells, 10 of them possible here, 0 finished" in out
    assert "judge calls: 0 (" in out
    assert not bench.folder.exists(), "a plan writes nothing"
    bench.spec.write_text(
        "models: [llava15]\nbenchmarks: [MMVet, POPE]\nmethods: [{method: fastv, ratios: [0.5]}]\n"
        "controls: []\njudge: gpt-4o\n"
    )
    assert bench.call("plan") == 0
    out = capsys.readouterr().out
    assert "4 cells, 0 of them possible here" in out
    assert "not here: llava15" in out
    assert "judge calls: 436 (about $" in out, "two variants of MMVet's 218 samples"
    assert float(out.split("status.py): ")[1].split()[0]) > 0.1


class Full:
    """A journal's file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        fits = min(len(data), self.room[0])
        self.room[0] -= fits
        self.file.write(data[:fits])
        if fits < len(data):
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        return fits


def test_a_full_disk_loses_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.call("run", "--quiet") == 0
    disturbed = bench.elsewhere(bench.folder.parent / "full")
    append = Journal.append
    room = [0]

    def tight(self: Journal, *line: Any) -> None:
        self._file = Full(self._file, room) if not isinstance(self._file, Full) else self._file
        append(self, *line)

    draw = random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", tight)
        for _ in range(4):
            room[0] = draw.randint(0, 4000)
            assert disturbed.call("run", "--quiet") == 2
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", tight)
        room[0] = 10
        plan = make(load(disturbed.spec), disturbed.folder / "runs")
        with pytest.raises(DiskFullError):
            work(plan, Stop(), Hooks())
    assert not list(disturbed.folder.rglob("*.lease"))
    assert disturbed.call("run", "--quiet") == 0
    assert disturbed.results() == bench.results()


@pytest.mark.slow
def test_killed_over_and_over_ends_in_the_same_bytes(bench: Bench) -> None:
    """SIGKILL, SIGTERM and two workers at once, at random moments, until runs were ended in every phase."""
    first = bench.start("run", "--quiet")  # also starts the server, whose imports take a while
    first.join(300)
    assert first.exitcode == 0
    start = time.monotonic()
    probe = bench.elsewhere(bench.folder.parent / "probe")
    process = probe.start("run", "--quiet")
    process.join(300)
    whole = time.monotonic() - start
    assert process.exitcode == 0
    assert probe.results() == bench.results()

    draw = random.Random(1)
    ended: list[int | None] = []
    rounds = 0
    while len([code for code in ended if code]) < 14 and rounds < 8:
        disturbed = bench.elsewhere(bench.folder.parent / f"disturbed{rounds}")
        for attempt in range(20):
            processes = [disturbed.start("run", "--quiet") for _ in range(1 + (attempt % 3 == 2))]
            time.sleep(draw.uniform(0.05, 0.6) * whole)
            for process in processes:
                if process.exitcode is None:
                    process.kill() if draw.random() < 0.6 else process.terminate()
            for process in processes:
                process.join(120)
                ended.append(process.exitcode)
            if 0 in ended[-len(processes) :]:
                break
        last = [disturbed.start("run", "--quiet") for _ in range(2)]
        for process in last:
            process.join(300)
        assert [process.exitcode for process in last] == [0, 0]
        assert disturbed.results() == bench.results()
        rounds += 1
    assert -signal.SIGKILL in ended
    assert 75 in ended, "SIGTERM ends a worker between two samples"
    assert len([code for code in ended if code]) >= 14, f"hardly any run was cut short: {ended}"


@pytest.mark.slow
def test_two_processes_share_the_work(bench: Bench) -> None:
    """``--workers 2``: processes of their own answer, this one scores; the bytes are those of a single process."""
    assert bench.call("run", "--quiet") == 0
    both = bench.elsewhere(bench.folder.parent / "both")
    assert both.call("run", "--quiet", "--workers", "2") == 0
    assert both.results() == bench.results()
    marks = [json.loads(path.read_text()) for path in both.folder.glob("sweeps/small/done/*.json")]
    assert sum(mark["answered"] for mark in marks) == 10


@pytest.mark.slow
def test_more_processes_than_units_and_one_that_dies(bench: Bench) -> None:
    """Six processes for four units; the first to hold one is killed while it answers, and the others finish it."""
    first = bench.start("run", "--quiet")
    first.join(300)
    assert first.exitcode == 0
    many = bench.elsewhere(bench.folder.parent / "many")
    processes = [many.start("run", "--quiet") for _ in range(6)]
    held: list[int] = []
    while not held and any(process.is_alive() for process in processes):
        for lease in many.folder.rglob("*.lease"):
            with suppress(OSError, ValueError):  # it is being written, or gone again
                held.append(int(json.loads(lease.read_text())["pid"]))
        time.sleep(0.01)
    (victim,) = [process for process in processes if process.pid == held[0]]
    victim.kill()
    for process in processes:
        process.join(300)
    assert victim.exitcode == -signal.SIGKILL
    assert [process.exitcode for process in processes if process is not victim] == [0] * 5
    assert many.results() == bench.results()
    assert not list(many.folder.rglob("*.lease"))
    marks = list(many.folder.glob("sweeps/small/done/*.json"))
    assert len(marks) == 4
