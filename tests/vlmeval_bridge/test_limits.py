"""A run cut by --limit says beforehand what it cannot score, and scores everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import DataMissing
from ivcp_eval.runs.planning.plan import RunPlan, make
from ivcp_eval.runs.planning.spec import check
from tests.vlmeval_bridge.conftest import Laboratory, judge_for
from tests.vlmeval_bridge.miniatures import miniatures
from tests.vlmeval_bridge.test_matrix import NAMES


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


def plan(*data: str, runs: Path | None = None, **options: Any) -> RunPlan:
    raw = {"models": ["tiny"], "benchmarks": list(data), "methods": [{"method": "none"}], **options}
    return make(check(raw, "limits"), runs)


@pytest.mark.parametrize("limit", [0, -1])
def test_no_row_is_no_run(limit: int):
    with pytest.raises(ValueError, match=f"limit must be a whole number above 0, got {limit}"):
        plan("tiny_mcq", limit=limit)


def test_what_cannot_be_scored_is_said_and_passed_over(laboratory: Laboratory):
    laboratory.dataset("MMMU_DEV_VAL")
    laboratory.dataset("ChartQA_TEST")
    made = plan("MMMU_DEV_VAL", "ChartQA_TEST", limit=1)
    assert {benchmark.name for _, benchmark, _ in made.cells()} == {"ChartQA_TEST"}
    assert "no split that is scored" in made.problems[0]
    assert made.notices == ["ChartQA_TEST: not scored under --limit 1, for want of rows: augmented"]


@pytest.mark.parametrize("folder", ["a{}b", "x.tsv"])
def test_a_folder_that_vlmevalkit_cannot_use_is_said_first(tmp_path: Path, folder: str):
    with pytest.raises(ValueError, match="VLMEvalKit cannot work below"):
        plan("tiny_mcq", runs=tmp_path / folder)
