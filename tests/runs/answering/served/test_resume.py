"""Failures of servers in the results, and interrupted runs: the same bytes as undisturbed ones."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest

from ivcp_eval.cli import main
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.served import endpoint
from ivcp_eval.runs.answering.session import Session
from tests.runs.answering.served.conftest import Bench
from tests.runs.answering.served.engine import engine, said
from tests.runs.conftest import Bench as Process
from tests.vlmeval_bridge.judge.server import Reply, error

ONE = {"benchmarks": ["tiny_mcq"], "limit": 6}
WHOLE = [{"method": "none"}]


def again(bench: Bench, name: str, *more: str) -> int:
    return main(["sweep", "run", str(bench.folder / f"{name}.yaml"), "--runs", str(bench.folder / "runs"), *more])


def test_failed_answers_are_counted_and_tried_again(bench: Bench, session: Session) -> None:
    ill = {1: error(500, "oops", retry_after_ms="1"), 2: said("maybe", "length", new=1)}
    questions: list[str] = []
    healed = False

    def trouble(body: dict[str, Any], n: int) -> Reply | None:
        question = str(body["messages"])
        if question not in questions:
            questions.append(question)
        return None if healed else ill.get(questions.index(question))

    with engine(session, Variant("tiny"), trouble) as server:
        assert bench.sweep("ill", server.url, WHOLE, **ONE) == 1
        (row,) = bench.rows("ill").values()
        assert (row["status"], row["n_failed"], row["n_samples"]) == ("incomplete", 2, 6)
        assert "NoAnswer 1" in row["reason"]
        assert "CutShort 1" in row["reason"]
        failed = [sample for sample in bench.samples(row) if sample["error"]]
        assert [sample["prediction"] for sample in failed] == ["", ""]
        healed, before = True, len(server.requests)
        assert again(bench, "ill", "--retry-failed", "--quiet") == 0
        assert len(server.requests) - before == 1 + 2, "a probe, and what failed"
        mended = bench.results("ill")
        assert bench.sweep("well", server.url, WHOLE, **ONE) == 0
        assert bench.rows("well").popitem()[1]["run_id"] == row["run_id"]
    assert mended["ill.csv"] == bench.results("well")["well.csv"]


def test_answers_without_text_count_as_wrong(bench: Bench, session: Session) -> None:
    def trouble(body: dict[str, Any], n: int) -> Reply | None:
        return said("") if body["messages"] == first[0] else None

    first: list[Any] = []
    with engine(session, Variant("tiny"), lambda body, n: first.append(body["messages"]) or trouble(body, n)) as server:
        assert bench.sweep("silent", server.url, WHOLE, **ONE) == 0
    (row,) = bench.rows("silent").values()
    assert (row["status"], row["n_failed"]) == ("ok", 1)
    assert "count as wrong (NoText 1)" in row["reason"]


@pytest.mark.slow
def test_a_run_that_lost_its_server_or_its_life_ends_like_any_other(
    bench: Bench, session: Session, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoint, "_PAUSE_S", 0.01)
    answers_left, slow = 1000, False

    def trouble(body: dict[str, Any], n: int) -> Reply | None:
        nonlocal answers_left
        time.sleep(0.3 * slow)
        answers_left -= 1
        return error(403, "closed for today") if answers_left < 0 else None

    with engine(session, Variant("tiny"), trouble) as server:
        assert bench.sweep("run", server.url, WHOLE, **ONE) == 0
        lost, killed = Bench(bench.folder / "lost"), Bench(bench.folder / "killed")
        for place in (lost, killed):
            place.folder.mkdir()
            shutil.copy(bench.folder / "run.yaml", place.folder)
        answers_left = 4
        assert again(lost, "run", "--quiet") == 1
        assert "closed for today" in capfd.readouterr().out
        answers_left = 1000
        assert again(lost, "run", "--quiet") == 0
        slow = True
        child = Process(killed.folder / "run.yaml", killed.folder, bench.folder / "LMUData").start("run", "--quiet")
        deadline = time.monotonic() + 200
        while sum(path.read_bytes().count(b"\n") for path in killed.folder.rglob("shards/*.jsonl")) < 2:
            assert time.monotonic() < deadline, "it answers nothing"
            time.sleep(0.02)
        child.kill()
        child.join()
        slow, before = False, len(server.requests)
        assert again(killed, "run", "--quiet") == 0
        assert len(server.requests) - before < 1 + 6, "what was answered is kept"
    assert bench.results("run") == lost.results("run") == killed.results("run")
