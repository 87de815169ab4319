"""What counts as done."""

from __future__ import annotations

import pytest

from ivcp_eval.runs.progress.tally import Tally


@pytest.mark.parametrize(
    ("answered", "scored", "complete"), [(4, 2, True), (4, 1, False), (3, 2, False), (0, 0, False)]
)
def test_all_must_be_answered_and_scored(answered: int, scored: int, complete: bool) -> None:
    assert Tally(samples=4, cells=2, answered=answered, scored=scored).complete is complete
