"""Every benchmark through VLMEvalKit's real class, with three models whose scores are known."""

from __future__ import annotations

import numpy as np
import pytest

from ivcp_eval import benchmarks
from ivcp_eval.reports.schema import SAMPLE_COLUMN_NAMES
from ivcp_eval.reports.stats.aggregates import COLUMNS, rule_for
from tests.vlmeval_bridge.conftest import Laboratory, judge_for
from tests.vlmeval_bridge.miniatures import GROUNDING, miniatures

NAMES = tuple(
    name
    for name in (*benchmarks.names("matrix"), *benchmarks.names("more"))
    if not benchmarks.load(name).file  # files of our own have no counterpart in VLMEvalKit
    and not benchmarks.load(name).sampling  # videos: test_videos.py
)
# A sample has one score, so a second metric that needs another one is compared without pairing.
UNPAIRED = {"relative score"}


def test_the_matrix_is_the_twenty():
    nine = ("SEEDBench_IMG", "MMBench_DEV_EN_V11", "MMStar", "MME", "POPE", "HallusionBench", "RealWorldQA")
    nine += ("TextVQA_VAL", "AI2D_TEST")
    assert set(benchmarks.names("matrix")) == {*GROUNDING, *nine, "MMVet", "OCRBench", "ChartQA_TEST"}
    assert len(benchmarks.names("matrix")) == 20
    assert set(NAMES) == set(miniatures())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("place", "who"), enumerate(("right", "wrong", "half")))
def test_the_metric_map_reads_the_score(laboratory: Laboratory, name: str, place: int, who: str):
    miniature = miniatures()[name]
    scored, rows = laboratory.score(name, getattr(miniature, who), judge_for(miniature))
    expected = {metric: values[place] for metric, values in miniature.scores.items()}
    assert {metric: score for metric, (score, _) in scored.metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert len(rows) == len(miniature.rows) - miniature.dropped
    assert set(rows[0]) == set(SAMPLE_COLUMN_NAMES)
    reproduced = {
        metric
        for metric, (score, scale) in scored.metrics.items()
        if metric not in UNPAIRED and recomputed(name, metric, scale, rows) == pytest.approx(score, abs=5e-4 * scale)
    }
    # OCRBench's and MME's scales are those of the whole file.
    whole = set() if name == "OCRBench" else set(expected) - UNPAIRED
    assert reproduced >= whole


def recomputed(name: str, metric: str, scale: float, rows: list) -> float:
    """The metric from our per-sample rows, as the comparison computes it."""
    rows = [row for row in rows if row["score"] is not None]
    columns = {column: np.array([row[column] for row in rows], dtype=object) for column in COLUMNS}
    rule = rule_for(name, metric, scale)
    clusters = rule.clusters(columns, np.array([row["cluster"] for row in rows]))
    return rule.value(columns, rule.scores(columns), clusters)
