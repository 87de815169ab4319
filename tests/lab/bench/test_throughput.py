"""A real bench of small shapes, joined to results of the same variants; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ivcp_eval.cli import main
from ivcp_eval.files import PACKAGE
from ivcp_eval.lab.bench import models, throughput
from ivcp_eval.reports.table import make_row, write_results
from ivcp_eval.reports.views.costs import read_bench

TINY = PACKAGE / "lab" / "tiny" / "model"


def _results(folder: Path, decoder: dict[str, Any] | None = None) -> Path:
    rows = []
    seeds: list[tuple[str, float, dict[str, Any]]] = 2 * [("random", 0.5, {"layer": None})]
    variants = [("none", 1.0, dict[str, Any]()), ("fastv", 0.5, {"layer": 1}), *seeds]
    for seed, (method, ratio, parameters) in enumerate(variants):
        if decoder is not None:
            (folder / f"{seed}").mkdir()
            (folder / f"{seed}" / "cell.json").write_text(json.dumps({"decoder": decoder}))
        rows.append(
            make_row(
                model="tiny", method=method, method_parameters=parameters, benchmark="b", metric="accuracy", score=60.0,
                status="ok", score_scale=100, n_samples=100, ratio_asked=ratio, ratio_layer_mean=ratio, seed=seed,
                run_id=f"{seed}", trained_weights=True, predictions=f"{seed}/predictions.csv" if decoder else "",
            )
        )  # fmt: skip
    write_results(folder / "r.csv", rows)
    return folder / "r.csv"


def test_a_bench_of_the_results_own_variants_is_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"layers": 3, "kv_heads": 2, "head_dim": 16}
    results = _results(tmp_path, sizes)
    load = ["--size", "tiny", "--concurrency", "1", "2", "1", "--new-tokens", "2", "--rounds", "2", "--threads", "1"]
    assert main(["bench", "throughput", *load, "--each", "2", "--of", str(results), "--out", f"{tmp_path}/made"]) == 0
    assert "fastv(layer=1) 0.5" in capsys.readouterr().out
    lines = read_bench(tmp_path / "made.csv")
    assert [(one.method, one.parameters, one.batch) for one in lines] == [
        (method, parameters, batch)
        for batch in (1, 2)
        for method, parameters in (("none", "{}"), ("fastv", '{"layer":1}'), ("random", '{"layer":null}'))
    ]
    assert all(one.decoder.items() >= sizes.items() and one.requests_per_s > 0 for one in lines)
    assert lines[0].times["end_to_end"].ratio == lines[0].times["ttft_p95"].ratio == 1
    assert all(0 < (one.ttft_ms or 0) <= (one.ttft_p50_ms or 0) <= (one.ttft_p95_ms or 0) for one in lines)
    assert (lines[1].kv_bytes or 0) < (lines[0].kv_bytes or 0)
    assert 0 < (lines[1].decode_memory_ms or 0) < (lines[0].decode_memory_ms or 0), "a smaller cache is read"
    assert (lines[0].prefill_memory_ms or 0) < (lines[0].decode_memory_ms or 0), "which reads the head, too"
    assert main(["compare", str(results), "--cost", str(tmp_path / "made.csv"), "--resamples", "20"]) == 0
    shown = capsys.readouterr().out
    assert "fastv 0.5" in shown.partition("Cost, measured by")[2]
    assert "64 visual and 12 text tokens in, 2 out" in " ".join(shown.split()), "lines are folded"


def test_variants_of_results_keep_their_parameters_once(tmp_path: Path) -> None:
    options = throughput.parser().parse_args(["--of", str(_results(tmp_path))])
    assert throughput.arms_of(options) == [throughput.Arm("fastv", 0.5, {"layer": 1}), throughput.Arm("random", 0.5)]
    unpruned = {"model": "m", "method": "none", "ratio_asked": 1, "benchmark": "b", "metric": "m", "run_id": "x"}
    write_results(tmp_path / "none.csv", [make_row(**unpruned, status="failed", reason="x")])
    with pytest.raises(ValueError, match="no pruned variant"):
        throughput.arms_of(throughput.parser().parse_args(["--of", str(tmp_path / "none.csv")]))


def test_the_shape_may_be_a_checkpoints(tmp_path: Path) -> None:
    assert throughput._decoder(throughput._configuration(TINY))["layers"] == 6
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="is a llava; the bench makes up requests of qwen2_5_vl only"):
        throughput._configuration(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "fastv", "random", "--set", "layer=3"], "--set is of one method, got fastv, random"),
        (["--methods", "fastw"], "did you mean 'fastv'"),
    ],
)
def test_requests_that_mean_nothing_are_refused_at_once(options: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        throughput.main(["--size", "tiny", *options])


def test_a_shipped_checkpoints_shape_is_measured(tmp_path: Path) -> None:
    """Its vocabulary is smaller than other sizes', and its own ids of pictures stand in the middle of it."""
    load = [
        "--concurrency",
        "1",
        "--tokens",
        "64",
        "--new-tokens",
        "2",
        "--rounds",
        "1",
        "--each",
        "1",
        "--ratios",
        "0.5",
    ]
    for model in ("tiny", "tiny2"):
        folder, out = PACKAGE / "lab" / model / "model", tmp_path / model
        assert main(["bench", "throughput", "--config", str(folder), *load, "--out", str(out)]) == 0
        assert [line.method for line in read_bench(out.with_suffix(".csv"))] == ["none", "ivc_prune"]


def test_rows_end_at_their_own_length_and_clients_come_back() -> None:
    size = models.size("tiny")
    model = models.build_model(models.configuration(size), "cpu", torch.float32, "sdpa")
    inputs = models.make_inputs(model.config, 64, 2, size.text_tokens, torch.float32, "cpu")
    load = throughput.Workload(inputs, [1, 4, 2, 2], most=2)
    rows = load.rows([3, 2])
    assert torch.equal(rows["input_ids"], inputs["input_ids"][[1, 0]])
    assert torch.equal(rows["pixel_values"], inputs["pixel_values"])
    for arm in (throughput.Arm("none", 1.0), throughput.Arm("fastv", 0.5, {"layer": 1})):
        found = throughput.answer(model, load, arm)
        one, other, *again = found.traces
        assert one.sent == other.sent <= one.first == one.last == other.first < other.last
        assert [trace.sent for trace in again] == [one.last, other.last]
        assert again[0].first > other.last, "whoever waits is not let into a batch under way"
        assert [len(found.phases), *(phase.new_tokens for phase in found.phases)] == [2, 4, 2]
        assert found.seconds == again[0].last - one.sent
