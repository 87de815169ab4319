"""Benches of weights in fewer bits: other bytes are read, and lines join results of models that were stored alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ivcp_eval.cli import main
from ivcp_eval.engine.cost.traffic import Traffic
from ivcp_eval.interface.registry import adapter
from ivcp_eval.lab.bench import models
from ivcp_eval.reports.table import make_row, write_results
from ivcp_eval.reports.views.costs import read_bench


def results(path: Path, model: str, quantised: str) -> Path:
    common = {
        "model": model, "quantised": quantised, "benchmark": "b", "metric": "accuracy", "score": 60.0, "status": "ok",
        "score_scale": 100, "n_samples": 100, "seed": 0, "trained_weights": True, "predictions": "",
    }  # fmt: skip
    rows = [
        make_row(
            **common,
            method=method,
            method_parameters=parameters,
            ratio_asked=ratio,
            ratio_layer_mean=ratio,
            run_id=method,
        )
        for method, ratio, parameters in (("none", 1.0, {}), ("random", 0.5, {"layer": None}))
    ]
    write_results(path, rows)
    return path


def test_lines_join_results_of_weights_stored_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    alike = results(tmp_path / "alike.csv", "tiny@int8", "int8 torchao 0.1")
    whole = results(tmp_path / "whole.csv", "tiny", "")
    load = ["--size", "tiny", "--concurrency", "1", "--new-tokens", "2", "--rounds", "1", "--each", "1"]
    assert main(["bench", "throughput", *load, "--weights", "int8", "--of", str(alike), "--out", f"{tmp_path}/b"]) == 0
    bench = tmp_path / "b.csv"
    assert {line.quantised.partition(" ")[0] for line in read_bench(bench)} == {"int8"}
    capsys.readouterr()
    assert main(["compare", str(alike), "--cost", str(bench), "--resamples", "20"]) == 0
    assert "tiny@int8  random 0.5" in capsys.readouterr().out.partition("Cost, measured by")[2]
    assert main(["compare", str(whole), "--cost", str(bench), "--resamples", "20"]) != 0
    assert "its weights are as they are, the bench has int8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "library", "share"),
    [
        ("int8", "torchao", 1 / 4),
        ("int4", "torchao", 1 / 4),
        ("bnb8", "bitsandbytes", 1 / 4),
        ("bnb4", "bitsandbytes", 1 / 8),
    ],
)  # torchao's 4 bits lie in bytes of their own; scales, norms and biases come on top
def test_fewer_bytes_are_read(kind: str, library: str, share: float) -> None:
    pytest.importorskip(library)
    config = models.configuration(models.size("tiny"))
    stored = [
        Traffic.of(models.build_model(config, "cpu", torch.float32, "sdpa", weights), adapter("qwen2_5_vl"), 1.0)
        for weights in ("", kind)
    ]
    assert share < stored[1].layers / stored[0].layers < share + 0.1
    assert stored[1].head == stored[0].head
