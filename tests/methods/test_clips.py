"""What methods of videos share: counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ivcp_eval.engine.guards.rankings import Rankings
from ivcp_eval.engine.signals.source import images_at_cut
from ivcp_eval.interface import ImageSpan, ModelFacts, Signals, View
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods._clips import clips_of, cosines, in_turn, without_separators
from tests.methods.material import random_clips
from tests.methods.test_degenerate import CLIPS, chosen


def test_places_and_frames() -> None:
    video, picture = clips_of(random_clips((3, 1, 2), (0, 2, 2)))
    assert (video.frame.tolist(), video.place.tolist()) == ([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1])
    assert video.same_place([-1, 0, 1]).tolist() == [-1, -1, 0, 1, 2, 3]
    assert video.same_place([2, -1, 0]).tolist() == [4, 5, -1, -1, 0, 1]
    assert picture.tokens.tolist() == [6, 7, 8, 9]
    assert picture.same_place([-1]).tolist() == [-1] * 4


def test_a_place_that_the_other_frame_does_not_have() -> None:
    (video,) = clips_of(random_clips((2, 1, 3)))
    shorter = type(video)((type(video.frames[0])(torch.arange(2), 1, 2, video.frames[0].span), video.frames[1]))
    assert shorter.same_place([-1, 0]).tolist() == [-1, -1, 0, 1, -1]


def _with_a_newline(ratio: float) -> Signals:
    """A video of three frames of 2 x 3 tokens, a newline behind the last; then a picture."""
    signals = random_clips((3, 2, 3), (0, 1, 1), (0, 2, 2), ratio=ratio)
    first, second, last, newline, picture = (image.span for image in signals.images)
    longer = ImageSpan(
        torch.cat((last.columns, newline.columns)),
        lay_out=lambda span: (View("picture", np.arange(6).reshape(2, 3)),),
        frame=last.frame,
    )
    signals.images = images_at_cut([first, second, longer, picture], signals.visual, ratio, "clip")
    return signals


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.8])
def test_a_newline_behind_a_video_stays(name: str, ratio: float) -> None:
    selection = chosen(name, _with_a_newline(ratio))  # checked: it is part of the budget
    assert 18 in selection.keep
    if selection.merge is not None:
        (row,) = (selection.keep == 18).nonzero().flatten().tolist()
        alone = torch.nn.functional.one_hot(torch.tensor(18), 23).float()
        assert torch.equal(selection.merge.to_dense()[row], alone)


def test_all_frames_are_grids_without_a_newline() -> None:
    video, separators, n_kept = without_separators(clips_of(_with_a_newline(0.3))[0])
    assert [frame.span.grid for frame in video.frames] == [(2, 3)] * 3
    assert (video.tokens.tolist(), separators.tokens.tolist(), n_kept) == (list(range(18)), [18], 1)
    assert [frame.budget for frame in video.frames] == [2, 2, 1]  # of round(0.3 * 19)


def test_cosines() -> None:
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [torch.nan, 1.0]])
    got = cosines(states, torch.tensor([2, 0, -1, 1]))
    assert got.tolist() == pytest.approx([0.5**0.5, 0.0, -2.0, 0.0])


@pytest.mark.parametrize(
    ("budget", "counts"), [(2, [1, 0, 1]), (8, [4, 0, 4]), (10, [4, 2, 4]), (12, [4, 4, 4]), (0, [0, 0, 0])]
)
def test_one_tier_after_the_other(budget: int, counts: list[int]) -> None:
    assert in_turn(budget, [4, 4, 4], [[0, 2], [1]]) == counts


@pytest.mark.parametrize("name", CLIPS)
def test_videos_and_pictures_of_a_prompt_are_chosen_from_apart(name: str) -> None:
    clips = ((5, 3, 4), (0, 4, 4), (2, 2, 3))
    signals = random_clips(*clips, ratio=0.4, seed=3)
    together = chosen(name, signals)
    changed = signals.hidden.clone()
    changed[signals.visual[:60]] = changed[signals.visual[:60]].flip(0)  # another first video
    signals.hidden = changed
    assert together.keep[together.keep >= 60].tolist() == [t for t in chosen(name, signals).keep.tolist() if t >= 60]


@pytest.mark.parametrize("name", CLIPS)
def test_the_clip_not_the_frame_has_the_budget(name: str) -> None:
    assert {cut.budget for cut in make_method(name).cuts(ModelFacts("llava", 8), 0.3) if cut.ratio < 1} == {"clip"}
    signals = random_clips((6, 3, 3), ratio=0.25, seed=1)
    assert [image.budget for image in signals.images] == [3, 3, 2, 2, 2, 2]
    assert chosen(name, signals).keep.numel() == 14


@pytest.mark.parametrize("name", CLIPS)
def test_sound_states_are_not_counted_as_broken(name: str) -> None:
    """As an infinite score of what has nothing before it would be."""
    with Rankings() as rankings:
        chosen(name, random_clips((5, 3, 4), (0, 2, 3), ratio=0.6, seed=2))
    assert rankings.nonfinite() == 0


@pytest.mark.parametrize("wrapper", ["+ivc", "+dstp"])
@pytest.mark.parametrize("name", ["evs", "pool_time"])
def test_wrappers_hold_a_clips_budget(name: str, wrapper: str) -> None:
    method, signals = make_method(name + wrapper), random_clips((5, 3, 4), (0, 2, 3), ratio=0.35, seed=2)
    cuts = method.cuts(ModelFacts("qwen2_5_vl", 8, position_axes=3), 0.35)
    signals.cut = cuts[0]
    keep = method.select(signals).keep
    if wrapper == "+dstp":  # an observation; what the inner method keeps is remembered
        (state,) = signals.memory.values()
        keep = state.kept.nonzero().flatten()
    for clip in signals.clips:
        tokens = torch.cat([image.tokens for image in clip])
        assert int(torch.isin(keep, tokens).sum()) == sum(image.budget for image in clip)
