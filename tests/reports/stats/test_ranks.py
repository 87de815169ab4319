"""One variant against all others: paired, corrected, ranked, and the best of equal cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ivcp_eval.cli import main
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.stats.ranks import ranked
from ivcp_eval.reports.table import make_row, write_results, write_samples

N = 400
BASE = {"none": (300, 1.0), "ivc_prune": (260, 0.7), "fastv": (262, 0.71)}
#: method -> (answers right of 400, measured share of tokens over layers)
RIGHT = {**BASE, "divprune": (290, 0.69), "random": (180, 0.4)}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = []
    for method, (right, layers) in RIGHT.items():
        scores = np.zeros(N)
        scores[:right] = 1
        samples = [{"index": i, "score": s, "prediction": str(s)} for i, s in enumerate(scores)]
        write_samples(tmp_path / f"{method}.csv", samples)
        for ratio in (0.5, 0.25) if method == "ivc_prune" else (0.5,):
            rows.append(
                make_row(
                    model="tiny",
                    method=method,
                    benchmark="dev",
                    metric="accuracy",
                    status="ok",
                    score=100 * right / N,
                    score_scale=100,
                    ratio_asked=1.0 if method == "none" else ratio,
                    ratio_layer_mean=layers,
                    n_samples=N,
                    run_id=f"{method}{ratio}",
                    predictions=f"{method}.csv",
                    trained_weights=True,
                )
            )
    write_results(tmp_path / "r.csv", rows)
    return tmp_path / "r.csv"


def test_one_variant_is_the_reference_of_all(results: Path) -> None:
    comparison = compare(results, against="ivc_prune:0.5", resamples=2000)
    found = {row.variant: row for row in comparison.rows}
    assert set(found) == {"ivc_prune 0.25", "fastv 0.5", "divprune 0.5", "random 0.5"}, "whatever their ratio"
    assert {row.score_baseline for row in comparison.rows} == {65.0}
    assert all(row.paired for row in comparison.rows)
    assert found["divprune 0.5"].p_holm >= found["divprune 0.5"].p_value
    ranks = {name: (row.rank, row.rank_low, row.rank_high) for name, row in found.items()}
    assert ranks["divprune 0.5"] == (1, 1, 1)
    assert ranks["random 0.5"] == (5, 5, 5)
    assert ranks["fastv 0.5"] == (2, 2, 4), "two answers more prove nothing"
    text = comparison.to_terminal(999)
    assert "divprune 0.5 is best of 4, significantly better (+7.50 [" in text
    assert "1 [1, 1]" in text


def test_the_reference_may_be_the_best(results: Path) -> None:
    text = compare(results, against="divprune:0.5", resamples=200).to_terminal(999)
    assert "At the measured cost of divprune 0.5 (0.69 of the visual tokens, mean over layers)" in text
    assert "divprune 0.5 is best of 4." in text
    assert "no other variant was measured" in compare(results, against="random:0.5", resamples=200).to_terminal(999)


def test_what_is_no_variant(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(results), "--against", "ivc_prune:half"]) == 2
    assert "is not METHOD or METHOD:RATIO" in capsys.readouterr().err
    assert main(["compare", str(results), "--against", "ivc_prune:0.9"]) == 2
    assert "no row of ivc_prune 0.9" in capsys.readouterr().err


def test_a_method_without_a_ratio_is_met_at_equal_ratios_and_not_ranked(results: Path) -> None:
    rows = compare(results, against="random", resamples=200).rows
    assert {row.variant for row in rows} == {"ivc_prune 0.5", "fastv 0.5", "divprune 0.5"}
    assert all(row.rank is None for row in rows)


def test_equal_scores_have_one_rank(results: Path) -> None:
    """Their difference may be a rounding of the last bit."""
    rows = [replace(row, difference=-1.4e-14) for row in compare(results, against="ivc_prune:0.5", resamples=100).rows]
    assert {row.rank for row in ranked(rows)} == {1}
