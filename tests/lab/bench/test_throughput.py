"""A real bench of small shapes, joined to results of the same variants; and what it refuses."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivcp_eval.cli import main
from ivcp_eval.engine.cost.clock import Phases
from ivcp_eval.files import PACKAGE
from ivcp_eval.interface.registry import default_parameters, make_method, parameters_of, settable
from ivcp_eval.lab.bench import models, throughput
from ivcp_eval.reports.table import make_row, write_results
from ivcp_eval.reports.views.costs import read_bench

CHECKOUT = Path(__file__).parents[3]
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
    assert all(0 < (one.ttft_p50_ms or 0) <= (one.ttft_p95_ms or 0) and one.ttft_ms for one in lines)
    assert (lines[1].kv_bytes or 0) < (lines[0].kv_bytes or 0)
    assert 0 < (lines[1].decode_memory_ms or 0) < (lines[0].decode_memory_ms or 0), "a smaller cache is read"
    assert (lines[0].prefill_memory_ms or 0) < (lines[0].decode_memory_ms or 0), "which reads the head, too"
    assert main(["compare", str(results), "--cost", str(tmp_path / "made.csv"), "--resamples", "20"]) == 0
    shown = capsys.readouterr().out
    assert "fastv 0.5" in shown.partition("Cost, measured by")[2]
    assert "64 visual and 12 text tokens in, 2 out" in " ".join(shown.split()), "lines are folded"


def test_variants_of_results_keep_their_parameters_once(tmp_path: Path) -> None:
    options = throughput.parser().parse_args(["--of", str(_results(tmp_path))])
    arms = [throughput.Arm("fastv", 0.5, {"layer": 1}), throughput.Arm("random", 0.5)]
    assert throughput.arms_of(options) == (arms, [])
    unpruned = {"model": "m", "method": "none", "ratio_asked": 1, "benchmark": "b", "metric": "m", "run_id": "x"}
    write_results(tmp_path / "none.csv", [make_row(**unpruned, status="failed", reason="x")])
    with pytest.raises(ValueError, match="no pruned variant"):
        throughput.arms_of(throughput.parser().parse_args(["--of", str(tmp_path / "none.csv")]))


def _other(folder: Path, *variants: tuple[str, dict[str, Any]]) -> Path:
    common = {"model": "tiny", "benchmark": "b", "metric": "accuracy", "status": "ok", "score": 60.0, "run_id": "x"}
    sizes = {"score_scale": 100, "n_samples": 100, "ratio_asked": 0.5, "ratio_layer_mean": 0.5}
    rows = [make_row(**common, **sizes, method=m, method_parameters=p, seed=0) for m, p in variants]
    write_results(folder / "other.csv", rows)
    return folder / "other.csv"


def test_variants_that_no_method_is_any_more_are_named_and_the_others_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = _other(
        tmp_path,
        ("fastv", {"layer": 1, "depth": 3}),  # took that once
        ("iwp", {"layer": 1}),  # takes more today
        ("vanished", {}),
        ("prumerge", dict(default_parameters("prumerge"))),  # wants a class token, which this model has not
        ("random", {"layer": None}),
    )
    load = ["--size", "tiny", "--concurrency", "1", "--new-tokens", "2", "--rounds", "1", "--threads", "1"]
    assert main(["bench", "throughput", *load, "--each", "1", "--of", str(results), "--out", f"{tmp_path}/made"]) == 0
    assert [line.method for line in read_bench(tmp_path / "made.csv")] == ["none", "random"]
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    notes = {row["method"]: row["note"] for row in rows if "note" in row}
    assert list(notes) == ["fastv", "iwp", "vanished", "prumerge"]
    assert notes["fastv"] == "left out: method 'fastv' has no parameter 'depth'. Parameters: layer."
    assert "left out: iwp has a parameter " in notes["iwp"]
    assert "'vanished'" in notes["vanished"]
    assert "class token" in notes["prumerge"]
    assert "has no parameter 'depth'" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match=r"no pruned variant(.|\n)*fastv.* has no parameter 'depth'"):
        throughput.arms_of(throughput.parser().parse_args(["--of", str(_other(tmp_path, ("fastv", {"depth": 3})))]))


def test_a_wrapped_methods_parameters_are_its_own() -> None:
    """As results record them, the method inside has a place of its own; as they are given, it has none."""
    given = {"renumber": False, "ivc": 0.0}
    recorded = parameters_of(make_method("pyramiddrop+ivc", given))
    assert recorded["inner"]["renumber"] is False
    assert parameters_of(make_method("pyramiddrop+ivc", settable(recorded))) == recorded


def test_the_shipped_results_can_be_measured_as_the_docs_say() -> None:
    """The command of docs/bench.md, but for the measurement: every row is a variant of today, or named."""
    text = (CHECKOUT / "docs" / "bench.md").read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("ivcp bench throughput --of results/tiny.csv")]
    options = throughput.parser().parse_args(shlex.split(command)[3:])
    arms, left_out = throughput.arms_of(replace_path(options))
    assert {row["method"] for row in left_out} <= {"iwp"}
    assert throughput.Arm("pyramiddrop+ivc", 0.5, {"renumber": False}) in arms
    measured = {(line.method, line.ratio) for line in read_bench(CHECKOUT / "results" / "tiny.cost.csv")}
    assert measured == {(arm.method, arm.ratio) for arm in arms} | {("none", 1)}


def replace_path(options: argparse.Namespace) -> argparse.Namespace:
    """The results where the checkout is."""
    return argparse.Namespace(**{**vars(options), "of": CHECKOUT / options.of})


def test_a_smaller_picture_is_a_smaller_picture(tmp_path: Path) -> None:
    load = ["--size", "tiny", "--concurrency", "2", "--new-tokens", "2", "--rounds", "1", "--threads", "1"]
    options = ["--methods", "downsample", "--ratios", "0.5", "--out", str(tmp_path / "made")]
    assert main(["bench", "throughput", *load, "--each", "1", *options]) == 0
    whole, small = read_bench(tmp_path / "made.csv")
    assert (small.kv_bytes or 0) / (whole.kv_bytes or 1) == (32 + 12) / (64 + 12)


def test_every_round_and_request_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the summaries follow from them."""
    load = ["--size", "tiny", "--concurrency", "2", "--new-tokens", "3", "--rounds", "3", "--threads", "1"]
    assert main(["bench", "throughput", *load, "--each", "2", "--ratios", "0.5", "--out", str(tmp_path / "made")]) == 0
    whole, pruned = json.loads((tmp_path / "made.json").read_text())["rows"]
    for row in (whole, pruned):
        assert [len(requests) for requests in row["requests_ms_rounds"]] == [4, 4, 4]
        for requests, seconds, rate, p95 in zip(
            *(row[f"{what}_rounds"] for what in ("requests_ms", "end_to_end", "requests_per_s", "ttft_p95")),
            strict=True,
        ):
            assert all(sent < first <= last for sent, first, last in requests)
            assert [sent for sent, _, _ in requests] == [0, 0, requests[0][2], requests[1][2]], "of clients in turn"
            assert max(last for _, _, last in requests) == pytest.approx(1e3 * seconds, abs=0.01)
            assert rate == pytest.approx(4 / seconds)
            assert np.percentile([first - sent for sent, first, _ in requests[2:]], 95) == pytest.approx(p95, abs=0.01)
        assert row["requests_per_s"] == sorted(row["requests_per_s_rounds"])[1]
        assert row["prefill_ms"] == sorted(row["prefill_rounds"])[1]
        for stage in ("prefill", "first_token", "decode", "end_to_end", "ttft_p50", "ttft_p95"):
            pairs = zip(row[f"{stage}_rounds"], whole[f"{stage}_rounds"], strict=True)
            ratio = np.exp(np.mean([np.log(mine / its) for mine, its in pairs]))
            assert row[f"{stage}_ratio"] == pytest.approx(ratio), "over the unpruned model, not under it"
    monkeypatch.setattr(throughput, "MOST_REQUESTS", 3)
    traces = [throughput.Trace(5.0, 6.0, 7.0)] * 9
    assert throughput._requests_ms(throughput.Answered(traces, 3, [])) == [[0, 1000, 2000]] * 3


def test_the_times_of_a_variant_are_over_the_unpruned_models() -> None:
    def answered(seconds: float) -> throughput.Answered:
        phases = Phases(vision_ms=0.0, prefill_ms=100 * seconds, decode_ms=seconds, decode_steps=1)
        return throughput.Answered([throughput.Trace(0, seconds / 2, seconds)], 1, [phases])

    row = throughput._times([answered(2.0), answered(4.0)], [answered(1.0), answered(2.0)])
    for stage in ("prefill", "first_token", "decode", "end_to_end", "ttft_p50", "ttft_p95"):
        assert (row[f"{stage}_ratio"], row[f"{stage}_low"]) == pytest.approx((0.5, 0.5)), stage


def test_processor_time_does_not_count_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    size = models.size("tiny")
    model = models.build_model(models.configuration(size), "cpu", torch.float32, "sdpa")
    inputs = models.make_inputs(model.config, 64, 1, size.text_tokens, torch.float32, "cpu")
    load = throughput.Workload(inputs, [2], most=1)
    handle = model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    found = throughput.answer(model, load, throughput.Arm("none", 1.0), cpu_time=True)
    assert found.seconds < 0.5 < throughput.answer(model, load, throughput.Arm("none", 1.0)).seconds
    handle.remove()


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
