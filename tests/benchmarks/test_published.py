"""The table of published numbers: whole, consistent, and shown as it is."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from ivcp_eval.benchmarks.published import AVERAGE, AVERAGES, FOLDER, KEPT_MEANS, numbers, range_beside, sources
from ivcp_eval.cli import main
from ivcp_eval.files import BASELINES
from ivcp_eval.interface import models
from ivcp_eval.interface.registry import method_names
from ivcp_eval.reports.table import make_row, write_results

TINY = Path(__file__).parents[2] / "results" / "tiny.csv"


def test_every_number_has_a_source_and_a_meaning() -> None:
    found = numbers()
    assert len(found) == 4669
    assert {n.source for n in found} == sources().keys()
    assert {n.kept_means for n in found} == KEPT_MEANS.keys()
    assert {n.method for n in found} - {""} <= set(method_names())
    for name in {n.checkpoint for n in found} - {""}:
        models.find(name)
    assert all(n.score is not None for n in found if n.benchmark != AVERAGE)
    assert all(n.kept_percent is None or 0 < n.kept_percent <= 100 for n in found)


def test_unpruned_scores_are_those_of_the_same_source() -> None:
    own = {(n.source, n.model, n.benchmark, n.metric): n.score for n in numbers() if n.kept_means == "none"}
    compared = 0
    for n in numbers():
        key = (n.source, n.model, n.benchmark, n.metric)
        if n.unpruned is not None and key in own:
            assert n.unpruned == own[key], key
            compared += 1
    assert compared > 3900


def test_retained_is_of_the_same_source() -> None:
    visionzip = [n for n in numbers() if n.source == "2412.04467.t1" and n.is_named("llava15", "visionzip", "POPE")]
    by_tokens = {n.kept_tokens: n.retained for n in visionzip}
    assert by_tokens["192"] == pytest.approx(100 * 85.3 / 85.9)
    averages = [n for n in numbers() if n.benchmark == AVERAGE and n.printed_share is not None]
    assert averages
    assert all(n.retained == n.printed_share for n in averages)


def test_names_are_ours_or_theirs_in_any_case() -> None:
    (some, *_) = (n for n in numbers() if n.method == "divprune" and n.checkpoint == "qwen25")
    assert some.is_named("QWEN25", "DivPrune", None)
    assert some.is_named("qwen2.5-vl-7b", "divprune", some.benchmark.lower())
    assert not some.is_named("qwen2", None, None)


def test_range_beside_a_row() -> None:
    found = [n for n in numbers() if n.source == "2412.04467.t1"]
    beside = range_beside(found, "llava15", "visionzip", "POPE", 33.0, 1.0)
    assert beside is not None
    assert beside.lowest == pytest.approx(100 * 85.3 / 85.9)
    assert beside.sources == ("2412.04467.t1",)
    assert range_beside(found, "llava15", "visionzip", "POPE", 50.0, 1.0) is None


def test_no_cell_is_a_reference_to_what_nobody_else_can_open() -> None:
    for path in FOLDER.glob("*.csv"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"index ids?|\bid \d{6,}", text)
        widths = {len(row) for row in csv.reader(text.splitlines())}
        assert len(widths) == 1


def test_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "--model", "qwen25", "--method", "hawk", "--benchmark", "ChartQA_TEST"]) == 0
    out = capsys.readouterr().out
    assert "83.6" in out
    assert "peppery77_hawk.t1: peppery77/HAWK" in out
    assert main(["published"]) == 0
    assert "4669 published numbers" in capsys.readouterr().out
    assert main(["published", "--benchmark", "POPE", "--model", "gpt"]) == 1
    out = capsys.readouterr().out
    assert "There are models: LLaVA-1.5-7B (" in out
    assert "benchmarks:" not in out, "POPE is known"


def test_beside_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "--beside", str(TINY)]) == 0
    out = capsys.readouterr().out
    assert "ivc_prune" in out
    assert "nothing" in out, "of the shipped model nobody published anything"
    assert main(["published", "--method", "fastv", "--beside", str(TINY)]) == 0
    out = capsys.readouterr().out
    assert "fastv" in out
    assert "ivc_prune" not in out


def test_beside_results_a_row_is_held_against_its_own_first_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of part of a benchmark have another baseline; what answering twice changes stands beside both."""
    rows = []
    for limit, scores in ((None, (80.0, 79.0, 40.0)), (10, (50.0, 50.0, 10.0))):
        for method, score in zip(("none", "again", "fastv"), scores, strict=True):
            own = {"model": "tiny", "benchmark": "tiny_mcq", "metric": "accuracy", "method": method, "status": "ok"}
            share = 0.5 if method == "fastv" else 1.0
            own |= {"score": score, "score_scale": 100, "limit": limit, "run_id": f"{method} {limit}"}
            rows.append(make_row(**own, ratio_asked=share, ratio_kept_final=share, n_samples=limit or 100))
    write_results(tmp_path / "r.csv", rows)
    assert main(["published", "--beside", str(tmp_path / "r.csv")]) == 0
    out = capsys.readouterr().out
    lines = [words for line in out.splitlines() if len(words := line.split()) > 6 and words[0] == "tiny"]
    assert [line[4:7] for line in lines] == [["40.0", "-1.0", "50.0"], ["10.0", "+0.0", "20.0"]]


def test_every_average_of_the_paper_can_be_said() -> None:
    """FastV's rows state tokens as a mean over layers."""
    said = {
        (row["model"], row["method"], average.name): average.published(row["model"], row["method"])
        for average in AVERAGES
        for row in csv.DictReader((BASELINES / "ivc_prune_paper.csv").open(encoding="utf-8"))
        if row["benchmark"] == average.name
    }
    assert said["qwen25", "fastv", "average_8_grounding"] == "84.7 %, with 54 % of the tokens, mean over layers"
    assert said["qwen25", "ivc_prune", "average_8_grounding"] == "99.6 %, with 50 % of the tokens kept"
    assert all(re.match(r"[\d.]+ %, with \d+ % of", text) for text in said.values())
