"""Benchmark scores from per-sample scores equal what VLMEvalKit's own rating functions say."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pandas as pd
import pytest

from ivcp_eval.reports import stats
from ivcp_eval.reports.stats.aggregates import rule_for
from ivcp_eval.vlmeval_bridge.environment import import_vlmeval

GENERATOR = np.random.default_rng(0)


def parts_of(benchmark: str, metric: str, table: pd.DataFrame, scale: float = 100):
    """The rule, its per-sample terms and the numbers of the clusters."""
    rule = rule_for(benchmark, metric, scale)
    columns = {name: table[name].astype(str).to_numpy() for name in ("index", "category", "prediction", "answer")}
    clusters = rule.clusters(columns, table["cluster"].to_numpy())
    return (
        rule,
        rule.summands(columns, table["score"].to_numpy(float), clusters),
        np.unique(clusters, return_inverse=True)[1],
    )


def score_of(benchmark: str, metric: str, table: pd.DataFrame, scale: float = 100) -> float:
    rule, terms, _ = parts_of(benchmark, metric, table, scale)
    assert rule.terms is not None
    return float(rule.combine(terms.sum(axis=0)))


@pytest.fixture(scope="module")
def yorn():
    import_vlmeval()
    return import_module("vlmeval.dataset.utils.yorn")


def mme_table() -> pd.DataFrame:
    rows = [
        {"category": category, "image_path": f"{category}/{image}", "index": f"{category}-{image}-{question}"}
        for category in ("OCR", "color", "code_reasoning", "text_translation")
        for image in range(9)
        for question in range(2)
    ]
    table = pd.DataFrame(rows).assign(prediction="Yes", answer="Yes")
    table["cluster"] = table["image_path"]
    table["score"] = GENERATOR.random(len(table)) < 0.7
    return table.sample(frac=1, random_state=0)


def test_mme(yorn, tmp_path):
    table = mme_table()
    table.to_csv(tmp_path / "t.tsv", sep="\t", index=False)
    theirs = yorn.MME_rating(str(tmp_path / "t.tsv")).iloc[0]
    for metric in ("perception", "reasoning"):
        assert score_of("MME", metric, table, 2800) == pytest.approx(theirs[metric])
    assert score_of("MME", "total", table, 2800) == pytest.approx(theirs["perception"] + theirs["reasoning"])
    assert 0 < theirs["perception"] < 400


def pope_table() -> pd.DataFrame:
    n = 400
    table = pd.DataFrame({"index": range(n), "cluster": [f"image {i // 4}" for i in range(n)]})
    table["answer"] = GENERATOR.choice(["Yes", "No"], n)
    table["category"] = GENERATOR.choice(["adversarial", "adversarial,popular", "random,popular,adversarial"], n)
    table["extracted"] = GENERATOR.choice(["Yes", "No", "Unknown"], n, p=[0.5, 0.4, 0.1])
    table["prediction"] = table["extracted"].map({"Yes": "Yes, it is.", "No": "no", "Unknown": "A dog in yesterday's"})
    table["score"] = table["answer"] == table["extracted"]
    return table


def test_pope(yorn, tmp_path):
    table = pope_table()
    table.to_csv(tmp_path / "t.tsv", sep="\t", index=False)
    theirs = yorn.POPE_rating(str(tmp_path / "t.tsv")).set_index("split").loc["Overall"]
    for metric, column in (("f1", "Overall"), ("accuracy", "acc"), ("precision", "precision"), ("recall", "recall")):
        assert score_of("POPE", metric, table) == pytest.approx(theirs[column]), metric
    assert score_of("POPE", "Overall", table) == pytest.approx(theirs["Overall"])


def hallusion_table() -> pd.DataFrame:
    rows = [
        {"category": c, "l2-category": l2, "set_id": s, "index": f"x_{c}_{l2}_{s}_{f}_{q}", "cluster": f"{c}{l2}{s}{f}"}
        for c, l2 in (("VD", "ocr"), ("VS", "ocr"), ("VS", "map"))
        for s in range(4)
        for f in range(3)
        for q in range(3)
    ]
    table = pd.DataFrame(rows).assign(prediction="Yes", answer="Yes")
    table["score"] = GENERATOR.random(len(table)) < 0.85
    return table


def test_hallusion_bench(yorn, tmp_path):
    table = hallusion_table()
    table.to_csv(tmp_path / "t.tsv", sep="\t", index=False)
    theirs = yorn.Hallusion_rating(str(tmp_path / "t.tsv")).set_index("split").loc["Overall"]
    for metric in ("fAcc", "qAcc"):
        assert score_of("HallusionBench", metric, table) == pytest.approx(theirs[metric])
    assert rule_for("HallusionBench", "aAcc", 100).terms is None
    assert table["score"].mean() * 100 == pytest.approx(theirs["aAcc"])


def test_circular_counts_questions_not_rotations():
    table = pd.DataFrame({"index": [1, 1_000_001, 2_000_001, 2, 1_000_002], "score": [1, 1, 1, 1, 0]})
    table = table.assign(category="", prediction="", answer="", cluster=table["index"])
    assert score_of("MMBench_DEV_EN_V11", "accuracy", table) == 50
    assert rule_for("MMStar", "accuracy", 100).terms is None


def test_clusters_never_tear_a_group():
    columns = {"index": np.array(["1", "1000001", "2", "1000002"])}
    rule = rule_for("MMBench_DEV_EN_V11", "accuracy", 100)
    by_index = rule.clusters(columns, columns["index"])
    assert by_index[0] == by_index[1] != by_index[2]
    image = np.array(["one image"] * 4)
    assert (rule.clusters(columns, image) == image).all(), "coarser clusters stay"


@pytest.mark.parametrize(
    ("benchmark", "metric", "make"),
    [("MME", "total", mme_table), ("POPE", "f1", pope_table), ("HallusionBench", "qAcc", hallusion_table)],
)
def test_sums_of_clusters_score_any_resample(benchmark, metric, make):
    """The sums of drawn clusters give what the metric says of their samples, two draws of a cluster renamed apart."""
    table = make()
    rule, terms, ids = parts_of(benchmark, metric, table)
    for seed in range(5):
        draw = np.random.default_rng(seed).integers(0, ids.max() + 1, ids.max() + 1)
        pieces = []
        for number, cluster in enumerate(draw):
            piece = table[ids == cluster].copy()
            piece["cluster"] = [f"{number} {name}" for name in piece["cluster"]]
            if benchmark == "HallusionBench":
                piece["index"] = [f"{index}".replace("_ocr_", f"_ocr{number}_") for index in piece["index"]]
                piece["index"] = [f"{index}".replace("_map_", f"_map{number}_") for index in piece["index"]]
            pieces.append(piece)
        drawn = sum(terms[ids == cluster].sum(axis=0) for cluster in draw)
        assert float(rule.combine(drawn)) == pytest.approx(score_of(benchmark, metric, pd.concat(pieces)))


def test_bootstrap_of_a_sum_of_categories():
    """End to end: MME's interval is on MME's scale."""
    table = mme_table()
    worse = table.assign(score=table["score"].to_numpy(float) * (np.arange(len(table)) % 3 > 0))
    rule, before, ids = parts_of("MME", "total", table, 2800)
    _, after, _ = parts_of("MME", "total", worse, 2800)
    result = stats.paired_bootstrap(
        table["score"].to_numpy(float),
        worse["score"].to_numpy(float),
        ids,
        sums=stats.Sums(before, after, rule.combine),
        resamples=300,
    )
    assert result.n_clusters == 36
    assert result.baseline == pytest.approx(score_of("MME", "total", table))
    assert result.difference_interval.low < result.difference < result.difference_interval.high < 0
