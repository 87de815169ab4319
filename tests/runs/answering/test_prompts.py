"""Prompts are built while answering, once, and scoring finds the answers without them."""

from __future__ import annotations

import json

import pytest

from ivcp_eval.reports.table import read_results, read_samples
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import load
from ivcp_eval.runs.records.scoring import score_any
from ivcp_eval.runs.worker import Stop
from ivcp_eval.vlmeval_bridge import register
from tests.runs.sweep.conftest import Bench


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


def scored(bench: Bench) -> int:
    """Score what has no record; the number of cells."""
    n, waiting = score_any(make(load(bench.spec), bench.folder / "runs"), Stop(), lambda text: None)
    assert not waiting
    return n


def test_scoring_builds_no_prompt_and_runs_no_loop(
    bench: Bench, built: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ivcp_eval.vlmeval_bridge import evaluate

    monkeypatch.setattr(evaluate, "infer", None)
    assert bench.call("run", "--quiet") == 0
    assert built == [(0, 3), (3, 5)] * 2, "once per unit of the two benchmarks, for all five variants"
    assert [row["status"] for row in read_results(bench.csv)] == ["ok"] * 10


def test_keys_that_are_gone_or_stale_are_made_again(bench: Bench, built: list[tuple[int, int | None]]) -> None:
    assert bench.call("run", "--quiet") == 0
    before = bench.results()
    noted = sorted(bench.folder.glob("runs/tiny/*/prompts/*/*.json"))
    assert len(noted) == 4
    stale = json.loads(noted[0].read_text())
    noted[0].write_text(json.dumps({**stale, "keys": dict.fromkeys(stale["keys"], "0" * 64)}))
    noted[2].unlink()
    for record in bench.folder.glob("runs/tiny/*/*/run.json"):
        record.unlink()
    built.clear()
    assert scored(bench) == 10
    assert sorted(built) == [(0, None)] * 2, "once per benchmark, not per cell"
    assert bench.results() == before


def test_a_sample_that_was_never_answered_counts_as_wrong(bench: Bench) -> None:
    assert bench.call("run", "--quiet") == 0
    (record,) = bench.folder.glob("runs/tiny/tiny_mcq/fastv-*/run.json")
    journal = record.with_name("journal.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[1:]))
    record.unlink()
    assert scored(bench) == 1
    found = json.loads(record.read_text())
    assert (found["status"], found["n_samples"], found["n_failed"]) == ("incomplete", 5, 1)
    assert "no answer was made to this prompt" in found["reason"]
    errors = [sample["error"] for sample in read_samples(record.with_name("predictions.csv"))]
    assert sum(bool(error) for error in errors) == 1
