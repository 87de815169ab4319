"""A run cut by --limit says beforehand what it cannot score, and scores everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import DataMissing
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.planning import Request, make_plan
from tests.benchmarks.conftest import Laboratory, judge_for
from tests.benchmarks.miniatures import miniatures
from tests.benchmarks.test_matrix import NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_what_is_answered_is_scored(laboratory: Laboratory, tmp_path: Path, name: str, limit: int):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    laboratory.dataset(name)
    benchmark, miniature = benchmarks.load(name), miniatures()[name]
    path = laboratory.root / f"{name}.tsv"
    if (name, limit) in {("MME", 1), ("MMMU_DEV_VAL", 1)}:
        with pytest.raises(DataMissing, match="first 1 rows give no score"):
            benchmarks.notices(benchmark, path, limit)
        return
    said = " ".join(benchmarks.notices(benchmark, path, limit))
    dataset = bridge.build(benchmark, limit)
    given = {str(index): miniature.right[str(index)] for index in dataset.data["index"]}
    scored = bridge.score(benchmark, dataset, bridge.stored(dataset, given, tmp_path), judge_for(miniature))
    missing = [metric for metric in miniature.scores if metric not in scored.metrics]
    assert missing == (["augmented"] if name == "ChartQA_TEST" and limit < 3 else [])
    assert all(metric in said for metric in missing)
    assert ("lack their pair" in said) == (len(dataset.data) < limit) == (name == "MME" and limit == 3)
    assert len(scored.samples) >= (len(dataset.data) if name != "MMMU_DEV_VAL" else limit - 1)


@pytest.mark.parametrize("limit", [0, -1])
def test_no_row_is_no_run(limit: int):
    with pytest.raises(ValueError, match=f"limit {limit} leaves no row"):
        make_plan(Request(Variant("tiny"), ("tiny_mcq",), limit=limit))


def test_what_cannot_be_scored_is_said_and_passed_over(laboratory: Laboratory):
    laboratory.dataset("MMMU_DEV_VAL")
    laboratory.dataset("ChartQA_TEST")
    plan = make_plan(Request(Variant("tiny"), ("MMMU_DEV_VAL", "ChartQA_TEST"), limit=1))
    assert {benchmark.name for benchmark, _ in plan.cells} == {"ChartQA_TEST"}
    assert "no split that is scored" in plan.missing[0]
    assert plan.notices == ["ChartQA_TEST: not scored under --limit 1, for want of rows: augmented"]


@pytest.mark.parametrize("folder", ["a{}b", "x.tsv"])
def test_a_folder_that_vlmevalkit_cannot_use_is_said_first(tmp_path: Path, folder: str):
    with pytest.raises(ValueError, match="VLMEvalKit cannot work below"):
        make_plan(Request(Variant("tiny"), ("tiny_mcq",), runs=tmp_path / folder))
