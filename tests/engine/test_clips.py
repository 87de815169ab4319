"""Budgets of videos: of each frame, or of a clip whose frames share it."""

from __future__ import annotations

import pytest
import torch

from ivcp_eval.engine.signals.source import images_at_cut
from ivcp_eval.interface import Cut, Frame, ImageSpan, Selection, Signals
from ivcp_eval.interface.ops import apportion


def _spans(clips: list[int | None], size: int) -> list[ImageSpan]:
    """Images of ``size`` tokens one after the other; a number says which clip the image is a frame of."""
    counts: dict[int, int] = {}
    spans = []
    for place, clip in enumerate(clips):
        frame = None
        if clip is not None:
            frame = Frame(clip, counts.get(clip, 0))
            counts[clip] = frame.index + 1
        spans.append(ImageSpan(torch.arange(size) + place * size, frame=frame))
    return spans


def test_a_clip_has_one_budget_and_a_picture_its_own() -> None:
    spans, columns = _spans([0, 0, 0, None, 1, 1], 7), torch.arange(42)
    by_image = images_at_cut(spans, columns, 0.3)
    assert [image.budget for image in by_image] == [2] * 6  # round(2.1)
    by_clip = images_at_cut(spans, columns, 0.3, "clip")
    assert [image.budget for image in by_clip] == [2, 2, 2, 2, 2, 2]  # 6, 2 and 4
    by_clip = images_at_cut(spans, columns, 0.33, "clip")
    assert [image.budget for image in by_clip] == [3, 2, 2, 2, 3, 2]  # round(6.93), round(2.31) and round(4.62)
    alive = torch.cat([columns[:1], columns[7:]])  # of the first frame one token is left
    by_clip = images_at_cut(spans, alive, 0.33, "clip")
    assert [image.budget for image in by_clip] == [1, 3, 3, 2, 3, 2]


def test_a_clip_budget_is_checked_per_clip() -> None:
    images = images_at_cut(_spans([0, 0, 1, 1], 4), torch.arange(16), 0.5, "clip")
    nothing = torch.zeros(0, dtype=torch.int64)
    signals = Signals(
        images=images,
        visual=torch.arange(16),
        text=nothing,
        question=nothing,
        hidden=torch.zeros(16, 2),
        rope=lambda: (torch.zeros(1), torch.zeros(1)),
        attention=lambda *_, **__: torch.zeros(1),
        cut=Cut(0, 0.5, budget="clip"),
    )
    assert [len(clip) for clip in signals.clips] == [2, 2]
    Selection(torch.tensor([0, 1, 2, 3, 12, 13, 14, 15])).check(signals, "moving")
    with pytest.raises(ValueError, match="kept 5 visual tokens of clip 0, the clip's budget is 4"):
        Selection(torch.tensor([0, 1, 2, 3, 4, 13, 14, 15])).check(signals, "moving")


@pytest.mark.parametrize(
    ("total", "shares", "limits", "split"),
    [
        (7, [1, 1, 1], [9, 9, 9], [3, 2, 2]),
        (7, [5, 1, 1], [3, 9, 9], [3, 2, 2]),
        (6, [0.5, 0.25, 0.25], [2, 2, 2], [2, 2, 2]),
        (0, [0, 0], [4, 4], [0, 0]),
    ],
)
def test_a_total_is_split_by_shares_within_limits(
    total: int, shares: list[float], limits: list[int], split: list[int]
) -> None:
    assert apportion(total, shares, limits) == split


@pytest.mark.parametrize(("total", "shares"), [(9, [1, 1]), (3, [0, 0])])
def test_what_cannot_be_split_is_refused(total: int, shares: list[float]) -> None:
    with pytest.raises(ValueError, match="split"):
        apportion(total, shares, [4, 4])
