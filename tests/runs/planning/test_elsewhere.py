"""Planning, looking and scoring on a machine without the GPU that answers: the same cells as on one that has it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ivcp_eval.reports.table import read_results
from ivcp_eval.runs.executors.slurm import Task
from ivcp_eval.runs.planning import placement
from ivcp_eval.runs.planning.plan import RunPlan, make, write_manifest
from ivcp_eval.runs.planning.spec import check, load
from ivcp_eval.runs.records.state import mark, shard
from ivcp_eval.runs.store.journal import Journal
from tests.runs.conftest import Bench


def hashes(plan: RunPlan) -> list[str]:
    return [cell.identity.hash for _, _, cell in plan.cells()]


@pytest.mark.parametrize("flash", [False, True])
def test_a_login_node_plans_the_cells_of_a_gpu_node(bench: Bench, monkeypatch: pytest.MonkeyPatch, flash: bool) -> None:
    runs = bench.folder / "runs"
    assert not torch.cuda.is_available()
    monkeypatch.setattr(placement, "find_spec", lambda name: object() if flash and name == "flash_attn" else None)
    planned = make(load(bench.spec), runs, "cuda", plan_only=True)
    found = planned.models["tiny"].placement
    assert (found.device, found.dtype) == ("cuda", "bfloat16")
    assert found.attention == ("flash_attention_2" if flash else "sdpa")
    assert make(load(bench.spec), runs, "cuda").problems == [
        f"tiny: device 'cuda' was asked for, but torch {torch.__version__} sees no CUDA device here"
    ], "who answers must have it"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: flash)
    assert hashes(make(load(bench.spec), runs)) == hashes(planned)
    assert hashes(make(load(bench.spec), runs, "cuda:1")) == hashes(planned)


def test_full_size_models_are_planned_for_a_gpu(random_model: Path, bench: Bench) -> None:
    raw = {"models": {"qwen25": str(random_model)}, "benchmarks": ["tiny_mcq"], "methods": [{"method": "none"}]}
    spec, runs = check(raw, "full"), bench.folder / "runs"
    assert "no CUDA device was found" in make(spec, runs).problems[0]
    assert make(spec, runs, plan_only=True).models["qwen25"].placement.device == "cuda"
    assert make(spec, runs, "cpu", plan_only=True).models["qwen25"].placement.device == "cpu"


def test_answers_of_a_gpu_are_seen_and_scored_without_one(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.call("run", "--quiet") == 0
    here = make(load(bench.spec), bench.folder / "runs")
    there = bench.elsewhere(bench.folder.parent / "cluster")
    plan = make(load(there.spec), there.folder / "runs", "cuda", plan_only=True)
    write_manifest(plan)
    for unit, twin in zip(plan.units(), here.units(), strict=True):
        for cell, other in zip(unit.cells, twin.cells, strict=True):
            with Journal(shard(cell, unit)).open() as journal:
                for key, answer in Journal(other.journal).load().items():
                    assert answer.device == "cpu"
                    journal.append(key, replace(answer, device="Test GPU"))
        mark(plan, unit).parent.mkdir(parents=True, exist_ok=True)
        mark(plan, unit).write_text(json.dumps({"samples": 3, "answered": 3, "failed": 0, "seconds": 1.0}))

    assert Task(str(there.spec), str(there.folder / "runs"), "", "cuda")() == 10
    mine, theirs = read_results(there.csv), read_results(bench.csv)
    assert [(row["status"], row["device"], row["dtype"]) for row in mine] == [("ok", "Test GPU", "bfloat16")] * len(
        mine
    )
    assert [row["score"] for row in mine] == [row["score"] for row in theirs]
    assert {row["device"] for row in theirs} == {"cpu"}
    capsys.readouterr()
    assert there.call("status") == 0, "the state is that of the run, wherever one looks"
    assert "0 samples left" in capsys.readouterr().out
