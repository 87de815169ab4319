"""What a mask says of the cells of a picture."""

from __future__ import annotations

import numpy as np

from ivcp_eval.interface import View
from ivcp_eval.interface.records.masks import CutMask, ImageCells, Masks


def test_a_cell_without_a_token_shows_nothing_of_another() -> None:
    """Index -1 is no token; the last one, which it would read, is alive, and went nowhere."""
    cells = np.array([[0, -1], [1, 2]])
    image = ImageCells(3, (View("picture", cells),))
    masks = Masks((image,), (CutMask(2, np.array([True, False, True]), np.array([-1, 2, -1])),))
    assert masks.mask().tolist() == [[True, False], [False, True]]
    assert masks.merged().tolist() == [[False, False], [True, False]]
    assert Masks((image,), ()).mask().tolist() == [[True, False], [True, True]]
    last = Masks((image,), (CutMask(2, np.array([True, True, False]), np.array([-1, -1, 0])),))
    assert last.merged().tolist() == [[False, False], [False, True]]
