"""The bench: structure of what it measures and writes, on a model of three layers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import torch

from ivcp_eval.lab.bench import models as bench_models
from ivcp_eval.lab.bench import pruning as bench
from ivcp_eval.lab.bench import report as bench_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "made" / "tiny"
    threads = torch.get_num_threads()
    assert bench.main(["--size", "tiny", "--threads", "1", "--rounds", "2", "--methods", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    return out


@pytest.fixture(scope="module")
def rows(finished):
    return json.loads(finished.with_name("tiny.json").read_text())["rows"]


def cell(rows, batch):
    return {row["variant"]: row for row in rows if row["batch"] == batch}


def test_every_variant_of_every_cell(rows):
    names = ["untouched", "ratio 1", "0.5 @ layer 1", "0.25 @ layer 2", "untouched, 32 visual", "untouched, 16 visual"]
    for batch in (1, 2):
        assert list(cell(rows, batch)) == [*names, "vision encoder"]


def test_what_is_exact_is_right(rows):
    for batch in (1, 2):
        found = cell(rows, batch)
        assert found["ratio 1"]["flop_bound"] == 1
        assert found["ratio 1"]["kv_ratio"] == 1
        # 64 visual and 12 text tokens; the cut shortens the caches of all layers.
        assert found["0.5 @ layer 1"]["kv_ratio"] == (32 + 12) / 76
        assert found["0.25 @ layer 2"]["kv_ratio"] == (16 + 12) / 76
        assert found["untouched"]["kv_bytes"] == 76 * batch * 3 * 2 * 2 * 16 * 4
        # 1 of 3 layers in full, 2 on 44 of 76 tokens: linear terms alone give 0.719, attention brings it below.
        assert (1 + 2 * (44 / 76) ** 2) / 3 < found["0.5 @ layer 1"]["flop_bound"] < (1 + 2 * 44 / 76) / 3


def test_summaries_follow_from_the_raw_values(rows):
    found = cell(rows, 1)
    mine, stock = found["0.5 @ layer 1"]["prefill_ms_rounds"], found["untouched"]["prefill_ms_rounds"]
    short = found["untouched, 32 visual"]["prefill_ms_rounds"]
    row = found["0.5 @ layer 1"]
    assert len(mine) == row["rounds"] == 2
    assert row["prefill_ratio"] == pytest.approx(sum(m / s for m, s in zip(mine, stock, strict=True)) / 2)
    layers = [(1 + 2 * s / full) / 3 for s, full in zip(short, stock, strict=True)]
    assert row["layer_bound"] == pytest.approx(sum(layers) / 2)
    assert row["over_bound"] == pytest.approx(row["prefill_ratio"] / row["flop_bound"] - 1)
    assert row["met"] == (row["over_bound"] <= 0.05)
    assert found["ratio 1"]["target"] == 0.03
    assert 0 < row["cut_ms"] < row["prefill_ms"]
    assert found["vision encoder"]["vision_ms"] > 0


def test_files_say_what_was_measured_on_what(finished):
    made = json.loads(finished.with_name("tiny.json").read_text())
    assert made["command"].startswith("ivcp bench --size tiny")
    assert made["torch"] == torch.__version__
    assert made["gpu"] is None
    assert made["threads"] == 1
    with finished.with_name("tiny.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len(made["rows"]) == 14
    assert tuple(lines[0]) == bench_report.COLUMNS


def test_table_shows_ratios_beside_bounds_and_flags_a_miss():
    row = {"attention": "sdpa", "visual_tokens": 64, "batch": 2, "variant": "ratio 1", "prefill_ratio": 1.1}
    text = bench_report.table([{**row, "flop_bound": 1.0, "over_bound": 0.1, "target": 0.03, "met": False}])
    assert "sdpa attention, 64 visual tokens, 2 at a time" in text
    for part in ("1.100", "1.000", "+10.0%", "<= 3%", "NO"):
        assert part in text
    assert "KV" not in text


def test_check_fails_on_a_missed_target(monkeypatch):
    monkeypatch.setattr(
        bench, "measure_all", lambda options, size, report, calls: report.add([{"variant": "x", "met": False}])
    )
    assert bench.main(["--size", "tiny"]) == 0
    assert bench.main(["--size", "tiny", "--check"]) == 1


def test_cells_after_the_time_limit_are_named_not_lost(capsys):
    assert bench.main(["--size", "tiny", "--threads", "1", "--limit-s", "0"]) == 0
    assert capsys.readouterr().out.count("skipped: --limit-s 0 was reached") == 5


def test_a_cell_that_does_not_fit_is_named_and_the_next_runs(monkeypatch, capsys):
    real = bench.measure_cell

    def crowded(setup, tokens, batch, seconds, calls):
        if batch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return real(setup, tokens, batch, seconds, calls)

    monkeypatch.setattr(bench, "measure_cell", crowded)
    assert bench.main(["--size", "tiny", "--threads", "1", "--rounds", "1", "--methods"]) == 0
    printed = capsys.readouterr().out
    assert "out of memory: CUDA out of memory. Tried to allocate 2 GiB" in printed
    assert "0.5 @ layer 1" in printed


def test_bad_arguments():
    with pytest.raises(ValueError, match="did you mean 'small'"):
        bench.main(["--size", "smal"])


def test_published_7b_shape():
    config = bench_models.configuration(bench_models.size("qwen25_7b"))
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656  # of Qwen/Qwen2.5-VL-7B-Instruct
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]


@pytest.mark.parametrize(("tokens", "grid"), [(1024, (32, 32)), (2048, (32, 64)), (12, (3, 4)), (7, (1, 7))])
def test_grid(tokens, grid):
    assert bench_models.grid_of(tokens) == grid


def test_help_is_light():
    code = "import sys, ivcp_eval.lab.bench.pruning as b; b.parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
