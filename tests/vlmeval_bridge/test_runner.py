"""`ivcp eval` with a judge that fails and recovers, and with a test set that is not whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ivcp_eval.cli import main
from ivcp_eval.reports.table import read_results, write_results
from tests.vlmeval_bridge.conftest import Laboratory
from tests.vlmeval_bridge.judge.server import completion, error, serve


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


def test_a_test_set_that_is_not_whole_is_said_before_and_after(
    laboratory: Laboratory, random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from ivcp_eval.reports.compare import compare

    laboratory.dataset("RefCOCO_testB")
    path = laboratory.root / "RefCOCO_testB.tsv"
    report_path = path.with_name("RefCOCO_testB.tsv.report.json")
    report = {"bytes": path.stat().st_size, "rows": 4, "expected_rows": 5095, "skipped": 2, "complete": False}
    report_path.write_text(json.dumps(report))
    try:
        assert evaluate(random_model, tmp_path, "--data", "RefCOCO_testB") == 0
    finally:
        report_path.unlink()
    said = capsys.readouterr().out
    assert said.index("4 of 5095 expressions, 2 skipped") < said.index("loaded tiny")
    rows = read_results(tmp_path / "r.csv")
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["metric"] for row in rows} == {"Acc@0.5", "Acc@0.75", "Acc@0.9", "mean IoU"}
    assert all("4 of 5095 expressions, 2 skipped" in row["reason"] for row in rows)
    assert "!!! PARTIAL DATA: the test set is not whole: 4 of 5095" in str(compare(tmp_path / "r.csv"))
    published = [
        {**row, "run_id": "", "source": "a paper", "predictions": "", "reason": ""}
        for row in rows
        if row["method"] == "none"
    ]
    write_results(tmp_path / "published.csv", published)
    with pytest.raises(ValueError, match="on part of the test set against a published one"):
        compare(tmp_path / "r.csv", tmp_path / "published.csv")


def test_a_file_with_another_checksum_is_left_alone_and_the_others_run(
    laboratory: Laboratory, random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    import vlmeval.dataset

    from ivcp_eval import benchmarks
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    laboratory.dataset("POPE")
    path = laboratory.root / "POPE.tsv"
    before, noted = path.read_bytes(), laboratory.checksums["POPE"]
    real = benchmarks.load.__wrapped__
    monkeypatch.setattr(benchmarks, "load", lambda name: real(name))
    monkeypatch.setitem(vlmeval.dataset.ImageYORNDataset.DATASET_MD5, "POPE", noted)
    monkeypatch.setattr("vlmeval.smp.file.download_file", lambda *_: pytest.fail("it was downloaded over"))
    monkeypatch.setattr("vlmeval.dataset.image_base.download_file", lambda *_: pytest.fail("it was downloaded over"))
    got = hashlib.md5(before).hexdigest()
    with pytest.raises(ValueError, match=rf"{got}, VLMEvalKit notes {noted}"):
        bridge.build(real("POPE"), None)
    options = ("--data", "POPE", "tiny_yes_no", "--limit", "2", "--method", "none")
    assert evaluate(random_model, tmp_path, *options) == 1
    said = capsys.readouterr()
    assert f"{got}, VLMEvalKit notes {noted}" in said.out + said.err
    assert [row["benchmark"] for row in read_results(tmp_path / "r.csv")] == ["tiny_yes_no"]
    assert path.read_bytes() == before
    assert evaluate(random_model, tmp_path, "--data", "POPE") != 0
    assert "loaded" not in capsys.readouterr().out
    assert main(["vlmeval", "--data", "POPE", "--model", "tiny"]) != 0
    assert f"notes {noted}" in capsys.readouterr().err
    assert path.read_bytes() == before
