"""Values of videos find their rows, however `generate` repeats them for beams."""

from __future__ import annotations

import pytest

from model_adapters._videos import per_video

ROWS = [[0.5, 0.75], [1.0], [2.0, 3.0, 4.0]]


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("repeated", ["not at all", "in place", "by row"])
def test_each_row_gets_the_values_of_its_videos(beams: int, repeated: str) -> None:
    values = {
        "not at all": [v for row in ROWS for v in row],
        "in place": [v for row in ROWS for v in row for _ in range(beams)],
        "by row": [v for row in ROWS for v in row * beams],
    }[repeated]
    wanted = [row for row in ROWS for _ in range(beams)]
    assert per_video(values, [len(row) for row in wanted], beams) == wanted


def test_values_of_other_videos_are_not_used() -> None:
    assert per_video([1.0, 2.0], [2, 1], 1) == [[None, None], [None]]
