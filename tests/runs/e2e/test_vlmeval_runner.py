"""VLMEvalKit's own runner takes our model names and benchmarks; registration is idempotent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ivcp_eval
from ivcp_eval.interface import models
from ivcp_eval.vlmeval_bridge.registration import default_names


@pytest.mark.slow
def test_vlmeval_runs_a_pruned_variant_of_any_ratio(tmp_path: Path) -> None:
    if not (models.PACKAGE / "lab" / "tiny" / "model" / "config.json").is_file():
        pytest.fail("the shipped model is missing")
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
