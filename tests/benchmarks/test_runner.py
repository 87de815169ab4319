"""`ivcp eval` with a judge that fails and recovers, and with a test set that is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivcp_eval.cli import main
from ivcp_eval.reports.table import read_results
from tests.benchmarks.conftest import Laboratory
from tests.benchmarks.judge.server import completion, error, serve


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def evaluate(model: Path, folder: Path, *options: str) -> int:
    common = ["eval", "--model", "tiny", "--model-path", str(model), "--runs", str(folder / "runs"), "--no-timing"]
    return main([*common, "--output", str(folder / "r.csv"), "--max-new-tokens", "2", *options])


def test_a_cell_whose_judge_fails_is_failed_and_retried(laboratory: Laboratory, random_model: Path, tmp_path: Path):
    laboratory.dataset("MMVet")
    broken = True

    def respond(body, n):
        return error(401, "no such key") if broken else completion("0.5")

    with serve(respond) as server:
        options = ("--data", "MMVet", "--judge-url", server.url)
        assert evaluate(random_model, tmp_path, *options) == 1
        rows = read_results(tmp_path / "r.csv")
        assert [row["status"] for row in rows] == ["failed", "failed"]
        assert all("refuses the request" in row["reason"] and row["score"] is None for row in rows)
        answers = {path: path.read_bytes() for path in tmp_path.rglob("journal.jsonl")}
        assert len(answers) == 2
        assert server.prompts == []

        broken = False
        assert evaluate(random_model, tmp_path, *options) == 0
        rows = read_results(tmp_path / "r.csv")
        assert [(row["status"], row["score"], row["judge_failures"]) for row in rows] == [("ok", 50, 0)] * 2
        assert all(row["judge"].endswith("@gpt-4o-2024-08-06") for row in rows)
        assert {path: path.read_bytes() for path in answers} == answers, "no sample was answered again"

        different = {json.loads(line)["prediction"] for content in answers.values() for line in content.splitlines()}
        assert len(server.prompts) <= 5 * len(different)
        sent = len(server.requests)
        assert evaluate(random_model, tmp_path, *options) == 0
        assert len(server.requests) == sent


def test_without_a_judge_mmvet_has_no_score(laboratory: Laboratory, random_model: Path, tmp_path: Path):
    laboratory.dataset("MMVet")
    assert evaluate(random_model, tmp_path, "--data", "MMVet", "--method", "none", "--judge", "exact_matching") == 1
    (row,) = read_results(tmp_path / "r.csv")
    assert (row["status"], row["score"]) == ("failed", None)
    assert "rated by a judge" in row["reason"]


def test_a_test_set_that_is_not_whole_is_incomplete(laboratory: Laboratory, random_model: Path, tmp_path: Path):
    laboratory.dataset("RefCOCO_testB")
    path = laboratory.root / "RefCOCO_testB.tsv"
    report_path = path.with_name("RefCOCO_testB.tsv.report.json")
    report = {"bytes": path.stat().st_size, "rows": 4, "expected_rows": 5095, "skipped": 2, "complete": False}
    report_path.write_text(json.dumps(report))
    try:
        assert evaluate(random_model, tmp_path, "--data", "RefCOCO_testB", "--method", "none") == 1
    finally:
        report_path.unlink()
    rows = read_results(tmp_path / "r.csv")
    assert {row["status"] for row in rows} == {"incomplete"}
    assert {row["metric"] for row in rows} == {"Acc@0.5", "Acc@0.75", "Acc@0.9", "mean IoU"}
    assert "4 of 5095 expressions, 2 skipped" in rows[0]["reason"]
