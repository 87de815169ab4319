"""Oracle: choices counted by hand."""

from __future__ import annotations

import torch

from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_clips, random_signals


def test_every_frame_keeps_as_much_and_in_time_every_token_is_kept() -> None:
    signals = random_clips((4, 4, 6), ratio=0.25, budget_of="image")
    keep = make_method("uniform_time").select(signals).keep
    frames = [keep[signals.image[keep] == t] - 24 * t for t in range(4)]
    assert frames[0].tolist() == [0, 2, 4, 12, 14, 16]  # of cells of 2 x 2 the first, as `uniform` takes it
    assert frames[1].tolist() == [1, 3, 5, 13, 15, 17]
    assert frames[3].tolist() == [7, 9, 11, 19, 21, 23]
    assert torch.cat(frames).sort().values.tolist() == list(range(24))


def test_a_picture_and_a_first_frame_are_those_of_uniform() -> None:
    for signals in (random_signals((5, 7), (3, 3), ratio=0.3), random_clips((1, 5, 7), budget_of="image", ratio=0.3)):
        keep = make_method("uniform").select(signals).keep
        assert torch.equal(make_method("uniform_time").select(signals).keep, keep)
