"""Oracle: frames counted by hand."""

from __future__ import annotations

import pytest
import torch

from ivcp_eval.interface import ModelFacts
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_clips, random_signals


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [
        (0.25, [0, 6, 0, 0, 0, 6, 0, 0]),
        (0.5, [6, 0, 6, 0, 6, 0, 6, 0]),
        (16 / 48, [0, 6, 0, 0, 6, 0, 4, 0]),
        (2 / 48, [0, 0, 0, 2, 0, 0, 0, 0]),
    ],
)
def test_frames(ratio: float, counts: list[int]) -> None:
    signals = random_clips((8, 2, 3), ratio=ratio)
    selection = make_method("fewer_frames").select(signals)
    selection.check(signals, "fewer_frames")
    assert torch.bincount(signals.image[selection.keep], minlength=8).tolist() == counts


def test_a_picture_is_thinned_as_by_uniform() -> None:
    signals = random_signals((4, 6), ratio=0.25)
    assert torch.equal(make_method("fewer_frames").select(signals).keep, make_method("uniform").select(signals).keep)


def test_positions_stay() -> None:
    for axes in (1, 3):
        (cut,) = make_method("fewer_frames").cuts(ModelFacts("any", 8, position_axes=axes), 0.5)
        assert not cut.renumber
