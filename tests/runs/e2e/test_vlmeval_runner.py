"""VLMEvalKit's own runner takes our model names and benchmarks, and answers and scores as ours does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import ivcp_eval
from ivcp_eval.cli import main
from ivcp_eval.interface import models
from ivcp_eval.reports.table import Row, read_samples
from ivcp_eval.runs.answering.live import live_model
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import load
from ivcp_eval.runs.store.journal import Journal
from ivcp_eval.vlmeval_bridge.reading.answers import is_empty
from ivcp_eval.vlmeval_bridge.registration import default_names
from tests.runs.conftest import Lab


@pytest.mark.slow
def test_vlmeval_runs_a_pruned_variant_of_any_ratio(tmp_path: Path) -> None:
    models.locate("tiny")  # shipped; says so if it is missing
    name = "tiny__ivc_prune__r0.4"
    arguments = ["--data", "tiny_mcq", "--model", name, "--limit", "2", "--judge", "exact_matching"]
    command = [sys.executable, "-m", "ivcp_eval", "vlmeval", "--", *arguments, "--work-dir", str(tmp_path / "out")]
    environment = {**os.environ, "LMUData": str(tmp_path), "PRED_FORMAT": "tsv", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    predictions = list((tmp_path / "out").rglob(f"{name}_tiny_mcq.tsv"))
    assert len(predictions) == 1, done.stdout[-2000:]
    assert list((tmp_path / "out").rglob(f"{name}_tiny_mcq_acc.csv"))


def test_registration_is_idempotent() -> None:
    first = ivcp_eval.register()
    import vlmeval.dataset
    from vlmeval.config import supported_VLM

    before = (len(vlmeval.dataset.DATASET_CLASSES), len(vlmeval.dataset.SUPPORTED_DATASETS), len(supported_VLM))
    assert ivcp_eval.register() == first == default_names()
    after = (len(vlmeval.dataset.DATASET_CLASSES), len(vlmeval.dataset.SUPPORTED_DATASETS), len(supported_VLM))
    assert after == before
    assert {"tiny", "tiny__ivc_prune", "qwen25__fastv__r0.25"} <= set(supported_VLM)
    assert vlmeval.dataset.DATASET_TYPE("tiny_yes_no") == "Y/N"
    assert vlmeval.dataset.DATASET_TYPE("tiny_grounding") == "GROUNDING"


def test_a_wrong_variant_name_is_explained() -> None:
    with pytest.raises(ValueError, match="did you mean 'ivc_prune'"):
        ivcp_eval.register(["tiny__ivc_prun__r0.5"])
    with pytest.raises(ValueError, match="MODEL__METHOD__rRATIO"):
        ivcp_eval.register(["tiny__ivc_prune__half"])


@pytest.mark.parametrize("name", ["tiny_mcq", "tiny_yes_no", "tiny_short", "tiny_grounding"])
def test_both_ways_give_the_same_answers_and_scores(lab: Lab, name: str) -> None:
    """VLMEvalKit's own loop with a live model, and ours: one pass, batches, scores from stored answers."""
    spec = lab.folder / "both.yaml"
    spec.write_text(
        f"models: {{tiny: {lab.model}}}\nbenchmarks: [{name}]\nmethods: [{{method: ivc_prune, ratios: [0.5]}}]\n"
        "controls: []\nlimit: 6\nmax_new_tokens: 6\ntiming: false\n"
    )
    assert main(["sweep", "run", str(spec), "--runs", str(lab.folder / "runs"), "--quiet"]) == 0
    plan = make(load(spec), lab.folder / "runs")
    model = plan.models["tiny"]
    session = Session(model.weights, model.placement, model.limits)
    benchmark, cells = model.groups[name]
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    for cell in cells:
        dataset = bridge.build(benchmark, 6)
        theirs = bridge.infer(dataset, live_model(session, cell.identity.variant), lab.folder / "theirs", ())
        scored = bridge.score(benchmark, dataset, theirs)
        record = json.loads(cell.record.read_text())
        ours = {metric: (found["score"], found["scale"]) for metric, found in record["metrics"].items()}
        assert ours == scored.metrics
        samples = read_samples(cell.predictions)
        assert [sample["score"] for sample in samples] == [scored.samples.get(sample["index"]) for sample in samples]
        given = dict(zip(dataset.data["index"].astype(str), _predictions(theirs), strict=True))
        answers = {sample["index"]: answer for sample, answer in zip(samples, _scored(cell, samples), strict=True)}
        assert answers == given


def _predictions(path: Path) -> list[str]:
    table = pd.read_pickle(path)  # which the bridge has just written
    return ["" if is_empty(text) else text for text in table["prediction"]]


def _scored(cell: Cell, samples: list[Row]) -> list[str]:
    """The texts that were evaluated."""
    journal = Journal(cell.journal).load()
    return [journal[sample["prompt_sha256"]].scored for sample in samples]
