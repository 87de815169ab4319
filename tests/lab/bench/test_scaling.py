"""`ivcp bench selection`: what it counts is there, methods that choose nothing are left out, targets can be missed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ivcp_eval.cli import main
from ivcp_eval.files import PACKAGE
from ivcp_eval.interface import Signals, registry
from ivcp_eval.lab.bench.scaling import (
    MOST_OF_A_FRAME,
    MOST_OPERATIONS,
    Cost,
    Widths,
    markdown_table,
    measure,
    no_row,
    of_videos,
    row,
    spans_of,
    work_of,
)
from tests.methods.test_published_settings import KNOWN

ROOT = PACKAGE.parent
SMALL = Widths(hidden=32, heads=4, groups=2, head=8)
COSTLY = dict.fromkeys(
    ("h2o", "lookm"), "adds up the attention of all tokens of the prompt in every layer, as the method says"
)

WITHOUT = {
    "none": "the unpruned model",
    "again": "answers as the unpruned model does",
    "deployed": "what a server chooses is not known here",
    "downsample": "makes pictures smaller before the model sees them",
    "fastocr": "masks tokens while decoding; nothing is chosen in the prefill",
    "adaspark": "masks pairs of tokens in every layer of the prefill; none leaves",
    **dict.fromkeys(("rotatek", "think"), "edits cached keys and chooses no tokens; `ivcp bench` times it"),
}


@pytest.mark.parametrize("name", registry.method_names())
def test_every_method_stays_below_the_targets(name: str) -> None:
    cost = measure(name, 1024, 0.5, SMALL)
    if cost is None:
        assert no_row(registry.make_method(name), name) == WITHOUT[name]
        return
    assert name not in WITHOUT
    assert row(name, [1024], [cost], SMALL)["met"] == (name not in COSTLY)
    if name not in COSTLY:
        assert 0 < cost.operations <= max(MOST_OPERATIONS, MOST_OF_A_FRAME * cost.frames), (
            "one step per token is one launch per token"
        )
    assert cost.frames == (4 if is_of_videos(name) else 1)


@pytest.mark.parametrize("name", ["cdpruner", "cdpruner_openvino"])
def test_wide_features_take_no_more_operations(name: str) -> None:
    """Where as many tokens add to a determinant as features are wide, thousands come from few rounds."""
    cost = measure(name, 2048, 0.5, Widths(hidden=1024))
    assert cost is not None
    assert cost.operations <= MOST_OPERATIONS


def is_of_videos(name: str) -> bool:
    method = registry.make_method(name)
    return method.for_videos or getattr(method, "budget_of", "image") == "clip"


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
    assert cost.work >= 1000 * 256 * 32
    assert not row("fastv", [256], [cost], SMALL)["met"]


def test_other_work_is_counted_by_the_element() -> None:
    states, many = torch.ones(8, 16), torch.ones(64, 16)
    for name, args, out, expected in (
        ("add", (states, states), states, 128),
        ("exp_", (states,), states, 4 * 128),
        ("_softmax", (states, -1), states, 8 * 128),
        ("mv", (states, states[0]), states[:, 0], 2 * 128),
        ("sum", (states,), states.sum(), 128),
        ("sort", (states[:, 0],), states[:, 0], 8 * 3),
        ("_cdist_forward", (states, many), torch.ones(8, 64), 3 * 8 * 64 * 16),
        ("index", (many, [torch.arange(8)]), states, 128),
    ):
        assert work_of(name, args, out) == expected, name
    share = row("some", [1024], [Cost(1.0, 1, 10**9, 10**9)], SMALL)["of prefill"]
    assert share == pytest.approx(2 * row("some", [1024], [Cost(1.0, 1, 10**9)], SMALL)["of prefill"])


def test_clips_are_frames_of_a_video() -> None:
    spans = spans_of(1024, 4)
    assert [(span.columns.tolist()[0], span.grid) for span in spans] == [(n, (16, 16)) for n in (0, 256, 512, 768)]
    assert [span.frame.index for span in spans if span.frame] == [0, 1, 2, 3]
    assert [(span.grid, span.frame) for span in spans_of(1024, 0)] == [((32, 32), None)]


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
    assert list(rows[0]) == ["method", "16 ms", "64 ms", "slope", "frames", "operations", "of prefill", "met"]
    shown = capsys.readouterr().out
    assert "divprune" in shown
    assert "no row of none: the unpruned model" in shown
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


@pytest.mark.parametrize("file", ["selection_scaling.csv", "selection_videos.csv"])
def test_every_method_with_results_has_a_recorded_row(file: str) -> None:
    """`ivcp bench selection --methods NAME --out FILE` adds one; `ivcp docs` writes the tables of docs/bench.md."""
    path, videos = ROOT / "results" / "bench" / file, "videos" in file
    with path.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    names = [one["method"] for one in rows]
    assert len(names) == len(set(names))
    choosing = set(of_videos()) if videos else set(registry.method_names()) - set(WITHOUT)
    assert set(KNOWN) & choosing <= set(names) <= choosing
    assert {one["method"] for one in rows if one["met"] != "True"} == (set() if videos else set(COSTLY))
    table = markdown_table(path).splitlines()
    assert len(table) == 2 + len(names)
    assert all(any(f"`{name}`" in line for line in table) for name in names)


def test_a_method_measured_again_replaces_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def names() -> list[str]:
        return [one["method"] for one in csv.DictReader(out.open())]

    out, sizes = tmp_path / "made.csv", ["--hidden", "16", "--tokens", "16", "64"]
    for method in ("hiprune", "fastv", "hiprune"):
        assert main(["bench", "selection", *sizes, "--methods", method, "--out", str(out)]) == 0
    assert names() == ["fastv", "hiprune"]
    capsys.readouterr()
    assert main(["bench", "selection", "--tokens", "16", "--methods", "fastv", "--out", str(out)]) == 2
    assert "measure the same sizes" in capsys.readouterr().err
    assert names() == ["fastv", "hiprune"]
