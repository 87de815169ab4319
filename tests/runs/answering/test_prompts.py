"""Prompts are built while answering, once, and scoring finds the answers without them."""

from __future__ import annotations

import json

import pytest

from ivcp_eval.reports.table import read_results
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.vlmeval_bridge import register
from tests.runs.conftest import Bench


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """The rows of every call that builds prompts."""
    register()
    from ivcp_eval.vlmeval_bridge import evaluate

    calls: list[tuple[int, int | None]] = []
    messages = evaluate.messages

    def counted(dataset: object, prompting: object, start: int = 0, stop: int | None = None) -> object:
        calls.append((start, stop))
        return messages(dataset, prompting, start, stop)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "messages", counted)
    return calls


def test_scoring_builds_no_prompt_and_runs_no_loop(
    bench: Bench, built: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ivcp_eval.vlmeval_bridge import evaluate

    monkeypatch.setattr(evaluate, "infer", None)
    assert bench.call("run", "--quiet") == 0
    assert built == [(0, 3), (3, 5)] * 2, "once per unit of the two benchmarks, for all five variants"
    assert [row["status"] for row in read_results(bench.csv)] == ["ok"] * 10


def test_keys_that_are_gone_or_stale_are_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.call("run", "--quiet") == 0
    before = bench.results()
    prompts = sorted(bench.folder.glob("runs/tiny/*/prompts/*/*.json"))
    assert len(prompts) == 4
    stale = json.loads(prompts[0].read_text())
    prompts[0].write_text(json.dumps({**stale, "keys": dict.fromkeys(stale["keys"], "0" * 64)}))
    prompts[2].unlink()
    for record in bench.folder.glob("runs/tiny/*/*/run.json"):
        record.unlink()
    monkeypatch.setattr(Session, "_together", None)
    assert bench.call("run", "--quiet") == 0, "no question is answered again"
    assert bench.results() == before


def test_an_answer_that_is_gone_is_made_again(bench: Bench) -> None:
    assert bench.call("run", "--quiet") == 0
    before = bench.results()
    (record,) = bench.folder.glob("runs/tiny/tiny_mcq/fastv-*/run.json")
    journal = record.with_name("journal.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[1:]))
    record.unlink()
    assert bench.call("run", "--quiet") == 0
    assert sorted(journal.read_text().splitlines(keepends=True)) == sorted(lines)
    assert bench.results() == before
