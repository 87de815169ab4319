"""Oracle: the score in double precision with loops, and what counts add up to; recorded answers are in oracle/."""

from __future__ import annotations

import math

import torch

from ivcp_eval.interface.registry import make_method
from tests.methods.material import best, random_clips, random_signals


def test_a_picture_keeps_what_is_least_like_its_mean() -> None:
    signals = random_signals((4, 5), ratio=0.3, seed=4)
    states = signals.hidden[signals.visual].double()
    calm = sorted(range(12), key=lambda channel: float(states[:, channel].var(correction=0)))[:6]
    unit = torch.nn.functional.normalize(states[:, calm], dim=1)
    apart = [float((row - unit.mean(dim=0)).square().sum()) for row in unit]
    typical = [sum(math.exp(-a / (2 * width)) for width in (0.125, 0.25, 0.5, 1, 2)) for a in apart]
    assert make_method("vidcom2").select(signals).keep.tolist() == best([-2 * t for t in typical], 6)


def test_counts() -> None:
    signals = random_clips((6, 3, 5), (0, 2, 4), ratio=0.31, seed=5)
    exact = make_method("vidcom2").select(signals)
    exact.check(signals, "vidcom2")
    assert exact.keep.numel() == round(0.31 * 90) + round(0.31 * 8)
    released = make_method("vidcom2", {"counts": "released"}).select(signals)
    assert released.keep.numel() == int(0.31 * 90) + int(0.31 * 8)
    shares = make_method("vidcom2", {"counts": "shares"}).select(signals)
    per_frame = torch.bincount(signals.image[shares.keep], minlength=7)
    assert per_frame.min() >= 1
    assert not shares.exact
    assert not released.exact


def test_a_frame_that_stands_out_keeps_more() -> None:
    signals = random_clips((5, 4, 4), ratio=0.4, seed=6)
    states = 0.1 * torch.randn(80, 12, generator=torch.Generator().manual_seed(0)) + torch.ones(12)
    states[32:48] *= -1
    signals.hidden = signals.hidden.index_copy(0, signals.visual, states)
    counts = torch.bincount(signals.image[make_method("vidcom2").select(signals).keep], minlength=5)
    assert counts.argmax() == 2
    assert counts[2] > counts[[0, 1, 3, 4]].max() + 3
