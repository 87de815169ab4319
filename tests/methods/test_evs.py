"""Oracle: change by hand; vLLM's answers are in oracle/."""

from __future__ import annotations

import pytest
import torch

from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_clips, random_signals


def test_what_does_not_move_leaves_first() -> None:
    signals = random_clips((4, 2, 3), ratio=9 / 24)
    still = signals.hidden[signals.visual[:6]].repeat(4, 1)
    still[[9, 10, 20]] = torch.randn(3, still.shape[1])  # two tokens change, and go back; later one does
    signals.hidden = signals.hidden.index_copy(0, signals.visual, still)
    keep = make_method("evs").select(signals).keep.tolist()
    assert keep[:6] == list(range(6))
    assert len(keep) == 9
    assert set(keep[6:]) <= {9, 10, 15, 16, 20}


def test_of_less_than_a_frame_and_of_a_picture_what_stays_is_spread_evenly() -> None:
    picture = random_signals((4, 6), ratio=0.25)
    uniform = make_method("uniform").select(picture).keep.tolist()
    assert make_method("evs").select(picture).keep.tolist() == uniform
    video = random_clips((8, 4, 6), ratio=6 / 192)
    assert make_method("evs").select(video).keep.tolist() == uniform


@pytest.mark.parametrize(("ratio", "kept"), [(0.1, 24), (0.5, 60), (0.26, 31)])
def test_counts(ratio: float, kept: int) -> None:
    """vLLM keeps one frame, here of 24 tokens, at least, and rounds 31.2 down."""
    signals = random_clips((5, 4, 6), ratio=ratio)
    selection = make_method("evs", {"counts": "released"}).select(signals)
    assert (selection.keep.numel(), selection.exact) == (kept, False)
    assert make_method("evs").select(signals).keep.numel() == round(ratio * 120)


def test_refused_counts() -> None:
    with pytest.raises(ValueError, match="counts='all' of method 'evs' must be one of 'ratio', 'released'"):
        make_method("evs", {"counts": "all"})
