"""Oracle: the rule token by token in Python, on motion that is made up here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ivcp_eval.interface import Frame, Signals
from ivcp_eval.interface.ops import budget, evenly
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods._clips import Clip, clips_of
from ivcp_eval.methods.codecsight import motion_of
from tests.engine import tiny_models
from tests.methods.material import pruned_columns, random_clips, random_signals


def moving(signals: Signals, motion: dict[int, Any]) -> Signals:
    """The same with the (T, rows, columns) motion of clips."""

    def shown(frame: Frame | None) -> Frame | None:
        known = frame is not None and frame.clip in motion
        return replace(frame, motion=np.asarray(motion[frame.clip][frame.index], np.float32)) if known else frame

    images = [replace(i, span=replace(i.span, frame=shown(i.span.frame))) for i in signals.images]
    return replace(signals, images=tuple(images))


def slow_choice(motion: list[float], kept: int, still: float = 0.25) -> list[int]:
    """The most moved, then of the equal ones those in the middles of even stretches."""
    moved = [m if m > still else 0.0 for m in motion]
    found: list[int] = []
    for value in sorted(set(moved), reverse=True):
        equal = [i for i, m in enumerate(moved) if m == value]
        left = kept - len(found)
        found += equal if len(equal) <= left else [equal[i] for i in evenly(len(equal), left).tolist()]
    return sorted(found)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
def test_choice(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    motion = {0: torch.rand(5, 3, 4, generator=generator), 2: torch.rand(2, 2, 3, generator=generator)}
    motion[0][0] = torch.inf
    signals = moving(random_clips((5, 3, 4), (0, 3, 3), (2, 2, 3), ratio=ratio), motion)
    assert {image.span.frame.clip for image in signals.images if image.span.frame} == set(motion)
    selection = make_method("codecsight", {"still": 0.4}).select(signals)
    selection.check(signals, "codecsight")
    first = 0
    for moved in (motion[0].flatten(), torch.zeros(9), motion[2].flatten()):
        wanted = slow_choice(moved.tolist(), budget(ratio, len(moved)), 0.4)
        kept = selection.keep[(selection.keep >= first) & (selection.keep < first + len(moved))] - first
        assert kept.tolist() == wanted
        first += len(moved)


def test_a_token_moves_as_far_as_what_it_shows() -> None:
    """Two by four cells of motion under a grid of one by two tokens, and under one of four by four."""
    cells = [[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    assert motion_of(clip_of((1, 2), cells)).tolist() == [3.0, 1.0]
    assert motion_of(clip_of((4, 4), cells)).view(4, 4).tolist() == [cells[0], cells[0], cells[1], cells[1]]


def clip_of(grid: tuple[int, int], cells: list[list[float]]) -> Clip:
    return clips_of(moving(random_clips((1, *grid)), {0: [cells]}))[0]


@pytest.mark.parametrize("signals", [random_signals((4, 5), ratio=0.3), random_clips((1, 4, 5), ratio=0.3)])
def test_what_nobody_says_moves_is_spread(signals: Signals) -> None:
    assert make_method("codecsight").select(signals).keep.tolist() == evenly(20, 6).tolist()


def test_all_that_moves() -> None:
    motion = torch.tensor([[[torch.inf] * 3], [[0.0, 0.3, 0.25]], [[0.1, 0.0, 4.0]]])
    signals = moving(random_clips((3, 1, 3), ratio=0.9), {0: motion})
    assert make_method("codecsight", {"counts": "released"}).select(signals).keep.tolist() == [0, 1, 2, 4, 8]


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_model_is_told_of_the_motion() -> None:
    module: Any = tiny_models.family("qwen2_5_vl")
    _, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs = make_inputs("t5 v0 t9")
    motion = torch.rand(3, 3, 5, generator=torch.Generator().manual_seed(1))
    columns = (inputs["input_ids"][0] == module.VIDEO).nonzero().flatten().tolist()
    frames = [[Frame(0, step, float(step), motion[step].numpy()) for step in range(3)]]
    kept = pruned_columns("codecsight", "qwen2_5_vl", inputs, 0.5, frames=frames)[0]
    assert [columns.index(c) for c in kept if c in columns] == slow_choice(motion.flatten().tolist(), 22)


def test_what_is_refused() -> None:
    for motion in (-torch.ones(3, 1, 3), torch.full((3, 1, 3), torch.nan), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match=r"got motion .* expected \(rows, columns\) of lengths in pixels"):
            make_method("codecsight").select(moving(random_clips((3, 1, 3)), {0: motion}))
    with pytest.raises(ValueError, match=r"still=-1.0 must be"):
        make_method("codecsight", {"still": -1.0})
