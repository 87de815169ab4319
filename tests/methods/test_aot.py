"""Oracle: budgets of segments by hand; what transport makes of tokens is in oracle/."""

from __future__ import annotations

import pytest
import torch

from ivcp_eval.interface.ops import merged_states
from ivcp_eval.methods.aot import Method
from tests.methods.material import random_clips


@pytest.mark.parametrize("apart", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("sizes", [[9, 9, 9, 9], [10, 1], [1, 10, 3], [5, 5, 5, 6], [1, 1]])
def test_a_segments_budget_is_met_whatever_its_frames_have(sizes: list[int], apart: float) -> None:
    method = Method(apart=apart)
    for budget in range(sum(sizes) + 1):
        anchors, stay = method._counts(sizes, budget)
        assert anchors * (2 if stay else 1) + sum(stay) == budget
        assert 0 <= anchors <= sizes[0]
        assert all(0 <= count <= size for count, size in zip(stay, sizes[1:], strict=False))


def test_the_released_counts_follow_where_they_fill_the_budget() -> None:
    assert Method()._counts([196] * 4, 2 * 50 + 3 * 15) == (50, [15] * 3)  # ceil(0.3 * 49)


def test_anchors_stand_at_the_head_of_a_segment_as_they_were_and_at_its_end_as_handed_on() -> None:
    signals = random_clips((6, 4, 5), ratio=0.4, seed=2)
    selection = Method().select(signals)
    selection.check(signals, "aot")
    assert selection.merge is not None
    merge = selection.merge.to_dense()
    torch.testing.assert_close(merge.sum(dim=1), torch.ones(len(merge)))
    segments = signals.image // 4  # four frames, and two
    for segment in (0, 1):
        assert bool((merge[segments[selection.keep] == segment][:, segments != segment] == 0).all())
    anchors, _ = Method()._counts([20] * 4, 32)
    first, last = (merge[segments[selection.keep] == 0][rows] for rows in (slice(anchors), slice(-anchors, None)))
    assert bool((first[:, signals.image > 0] == 0).all())
    assert bool((last[:, signals.image == 3].sum(dim=1) > 0).all())
    states = merged_states(selection.merge, signals.hidden[signals.visual])
    assert bool(states.isfinite().all())
