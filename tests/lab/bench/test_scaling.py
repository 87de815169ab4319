"""`ivcp bench selection`: what it counts is there, methods that choose nothing are left out, targets can be missed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ivcp_eval.cli import main
from ivcp_eval.interface import Signals, registry
from ivcp_eval.lab.bench.scaling import MOST_OPERATIONS, Cost, Widths, measure, of_videos, row

SMALL = Widths(hidden=32, heads=4, groups=2, head=8)
COSTLY = dict.fromkeys(
    ("h2o", "lookm"), "adds up the attention of all tokens of the prompt in every layer, as the method says"
)


@pytest.mark.parametrize("name", registry.method_names())
def test_every_method_stays_below_the_targets(name: str) -> None:
    cost = measure(name, 1024, 0.5, SMALL)
    if cost is None:
        assert name in ("none", "again", "deployed", "downsample", "fastocr", "rotatek", "think")
        return
    assert row(name, [1024], [cost], SMALL)["met"] == (name not in COSTLY)
    if name not in COSTLY:
        assert 0 < cost.operations <= MOST_OPERATIONS, "one step per token is one launch per token"


def test_operations_and_flops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def costly(self: object, signals: Signals) -> Tensor:
        states = signals.hidden[signals.visual]
        for _ in range(1000):
            states = states + 1
        return (states @ states.T).sum(dim=1)

    monkeypatch.setattr(registry.method_class("fastv"), "score", costly)
    cost = measure("fastv", 256, 0.5, SMALL)
    assert cost is not None
    assert 1000 < cost.operations < 1100
    assert cost.flops == 2 * 256 * 256 * 32
    assert not row("fastv", [256], [cost], SMALL)["met"]


def test_slope_is_that_of_the_last_two_sizes() -> None:
    costs = [Cost(5.0, 10, 0), Cost(1.0, 10, 0), Cost(4.0, 10, 10**18)]
    found = row("some", [16, 64, 128], costs, SMALL)
    assert found["slope"] == pytest.approx(2)
    assert found["64 ms"] == 1000
    assert not found["met"]


def test_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "made.csv"
    options = ["--tokens", "64", "16", "--methods", "fastv", "none", "divprune", "--hidden", "16", "--out", str(out)]
    assert main(["bench", "selection", *options, "--check"]) == 0
    assert torch.get_num_threads() == threads
    rows = list(csv.DictReader(out.open()))
    assert [one["method"] for one in rows] == ["fastv", "divprune"]
    assert list(rows[0]) == ["method", "16 ms", "64 ms", "slope", "operations", "of prefill", "met"]
    assert "divprune" in capsys.readouterr().out
    with pytest.raises(ValueError, match="did you mean 'fastv'"):
        measure("fastw", 64, 0.5, SMALL)


def test_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method that sees a clip as one, on 2 and 8 frames; budgets hold for the clip (`Selection.check`)."""
    names, out = of_videos(), tmp_path / "made.csv"
    assert {"evs", "fastvid", "prunevid", "fewer_frames", "codecsight"} <= set(names)
    options = ["--frames", "8", "2", "--per-frame", "16", "--hidden", "16", "--out", str(out)]
    assert main(["bench", "selection", *options]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [one["method"] for one in rows] == names
    assert list(rows[0])[:4] == ["method", "2 frames ms", "8 frames ms", "slope"]
    assert all(int(one["operations"]) > 0 for one in rows)
    assert main(["bench", "selection", "--frames", "2", "--per-frame", "2"]) == 2
    assert "--per-frame must be at least 4, got 2" in capsys.readouterr().err
