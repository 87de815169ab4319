"""A video's steps as one picture: every cell is where its token's frame stands, and nothing is anywhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from ivcp_eval.interface import Frame, View
from ivcp_eval.interface.records.masks import CutMask, ImageCells, Masks
from ivcp_eval.interface.records.sheets import drawn_steps, sheet_of, sheet_of_masks

GRID = (2, 3)


def step(clip: int, index: int, grid: tuple[int, int] = GRID, more: int = 0) -> ImageCells:
    """A grid step, with tokens in no cell behind it."""
    cells = np.arange(grid[0] * grid[1]).reshape(grid)
    return ImageCells(cells.size + more, (View("picture", cells),), Frame(clip, index))


def masks(images: Sequence[ImageCells]) -> Masks:
    total = sum(image.n_tokens for image in images)
    kept = np.random.default_rng(0).random(total) < 0.5
    return Masks(tuple(images), (CutMask(2, kept, np.where(kept, -1, 0)),))


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 9])
def test_cells_stand_in_their_frame(steps: int) -> None:
    picture = ImageCells(4, (View("picture", np.arange(4).reshape(2, 2)),))
    whole = masks([picture, *(step(0, i, more=i == steps - 1) for i in range(steps)), step(1, 0)])
    sheet = sheet_of_masks(whole)
    assert sheet.images[0].n_tokens == 6 * steps + 1
    assert sheet.kept() == sum(whole.kept(1 + i) for i in range(steps))
    shown, merged = sheet.mask(), sheet.merged()
    across = shown.shape[1] // GRID[1]
    assert across * (shown.shape[0] // GRID[0]) >= steps > across * (shown.shape[0] // GRID[0] - 1)
    for i in range(steps):
        row, column = i // across * GRID[0], i % across * GRID[1]
        where = np.s_[row : row + GRID[0], column : column + GRID[1]]
        np.testing.assert_array_equal(shown[where], whole.mask(1 + i))
        np.testing.assert_array_equal(merged[where], whole.merged(1 + i))
    assert (sheet.view().cells >= 0).sum() == 6 * steps
    assert sheet_of_masks(whole, clip=1).mask().tolist() == whole.mask(steps + 1).tolist()
    assert sheet_of_masks(whole, clip=2) is whole


@pytest.mark.parametrize(
    ("steps", "drawn"), [(3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (90, [0, 30, 59, 89])]
)
def test_a_bounded_sheet_has_frames_from_the_first_to_the_last(steps: int, drawn: list[int]) -> None:
    """Cells are those of the steps that are drawn, counts those of the whole clip."""
    assert drawn_steps(steps, 4) == drawn
    whole = masks([step(0, i) for i in range(steps)])
    sheet = sheet_of_masks(whole, most=4)
    assert (sheet.images[0].n_tokens, sheet.kept()) == (6 * steps, sum(whole.kept(i) for i in range(steps)))
    shown = sheet.mask()
    across = shown.shape[1] // GRID[1]
    for place, number in enumerate(drawn):
        row, column = place // across * GRID[0], place % across * GRID[1]
        where = np.s_[row : row + GRID[0], column : column + GRID[1]]
        np.testing.assert_array_equal(shown[where], whole.mask(number))
    assert (sheet.view().cells >= 0).sum() == 6 * len(drawn)


def test_frames_that_cannot_share_a_sheet_have_no_cells() -> None:
    for other in (step(0, 1, (3, 2)), ImageCells(6, (), Frame(0, 1))):
        sheet = sheet_of_masks(masks([step(0, 0), other]))
        assert (sheet.images[0].n_tokens, sheet.images[0].views) == (12, ())


def test_the_picture_has_the_first_frame_of_every_step() -> None:
    frames = [Image.new("RGB", (60, 40), (20 * i, 0, 0)) for i in range(9)]
    sheet = sheet_of(frames, [i / 2 for i in range(9)], 5)
    assert sheet.size == (180, 80)
    corners = [sheet.getpixel((60 * (i % 3) + 59, 40 * (i // 3) + 39)) for i in range(6)]
    assert corners == [(40 * i, 0, 0) for i in range(5)] + [(255, 255, 255)]
    assert sheet.crop((0, 0, 30, 20)).getcolors() != [(600, (0, 0, 0))], "its time stands there"
