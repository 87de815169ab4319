"""Oracle: torch's own average pooling over time where stretches are equal, explicit means elsewhere."""

from __future__ import annotations

from dataclasses import replace

import torch

from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods._clips import clips_of
from tests.methods.material import random_clips, random_signals


def test_equals_avg_pool() -> None:
    signals = random_clips((6, 2, 3), ratio=1 / 3)
    selection = make_method("pool_time").select(signals)
    selection.check(signals, "pool_time")
    assert selection.merge is not None
    states = signals.hidden[signals.visual]
    wanted = torch.nn.functional.avg_pool1d(states.view(6, 6, -1).permute(1, 2, 0), 3).permute(2, 0, 1).flatten(0, 1)
    torch.testing.assert_close(selection.merge.to_dense() @ states, wanted)
    assert selection.keep.tolist() == [*range(6, 12), *range(24, 30)]  # the middles of three frames


def test_what_is_left_over_gives_some_places_one_stretch_more() -> None:
    signals = random_clips((4, 1, 6), ratio=9 / 24)
    selection = make_method("pool_time").select(signals)
    assert selection.merge is not None
    states, merge = signals.hidden[signals.visual], selection.merge.to_dense()
    place = selection.keep % 6
    assert torch.bincount(place, minlength=6).tolist() == [2, 1, 2, 1, 2, 1]
    for row, token in zip(merge, selection.keep.tolist(), strict=True):
        members = row.nonzero().flatten()
        assert set((members % 6).tolist()) == {token % 6}
        assert len(members) == (2 if token % 6 in (0, 2, 4) else 4)
        torch.testing.assert_close(row @ states, states[members].mean(dim=0))


def test_less_than_a_frame_is_the_whole_time_in_the_cells_of_pool() -> None:
    signals = random_clips((3, 4, 6), ratio=6 / 72)
    selection = make_method("pool_time").select(signals)
    assert selection.merge is not None
    states = signals.hidden[signals.visual]
    wanted = torch.nn.functional.avg_pool3d(states.T.reshape(1, -1, 3, 4, 6), (3, 2, 2))[0].flatten(1).T
    torch.testing.assert_close(selection.merge.to_dense() @ states, wanted)
    assert selection.keep.tolist() == [24 + token for token in (0, 2, 4, 12, 14, 16)]


def test_a_picture_is_pooled_as_by_pool() -> None:
    signals = random_signals((5, 7), ratio=0.3)
    got, wanted = (make_method(name).select(signals) for name in ("pool_time", "pool"))
    assert torch.equal(got.keep, wanted.keep)
    assert got.merge is not None
    assert wanted.merge is not None
    torch.testing.assert_close(got.merge.to_dense(), wanted.merge.to_dense())


def test_a_frame_with_a_token_more() -> None:
    """A newline behind a video; it joins the last place."""
    signals = random_clips((3, 2, 2), (0, 1, 1), ratio=0.4)
    *frames, last, newline = signals.images
    longer = replace(last, tokens=torch.cat((last.tokens, newline.tokens)), n_prompt=5)
    (clip,) = clips_of(replace(signals, images=(*frames, longer)))
    assert len(clip.tokens) == 13
    kept, weights = make_method("pool_time").choose(signals, clip)  # type: ignore[attr-defined]
    assert len(kept) == clip.budget == 5
    torch.testing.assert_close(weights.to_dense().sum(dim=0).bool(), torch.ones(13, dtype=torch.bool))
