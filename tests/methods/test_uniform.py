"""Oracle: choices counted by hand, and what evenness means."""

from __future__ import annotations

import pytest
import torch

from ivcp_eval.interface.ops import evenly, partition
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_signals


def test_counted_by_hand() -> None:
    keep = make_method("uniform").select(random_signals((4, 6), ratio=0.25)).keep.tolist()
    assert keep == [0, 2, 4, 12, 14, 16]  # two bands of two rows, three stretches of two columns
    assert make_method("uniform").select(random_signals((1, 1), ratio=0.1)).keep.tolist() == [0]


def test_images_apart() -> None:
    both = make_method("uniform").select(random_signals((4, 6), (2, 2), ratio=0.25)).keep.tolist()
    assert both == [0, 2, 4, 12, 14, 16, 24]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (5, 8), (6, 6)])
def test_cells_cover_the_grid_and_are_compact(rows: int, columns: int) -> None:
    for k in range(1, rows * columns + 1):
        group, centre = partition(rows, columns, k)
        assert group.shape == (rows * columns,)
        assert group[centre].tolist() == list(range(k))
        sizes = group.bincount(minlength=k)
        assert sizes.min() >= 1
        for cell in range(k):
            where = (group == cell).nonzero().flatten()
            height = len({int(w) // columns for w in where})
            width = len({int(w) % columns for w in where})
            assert height * width == len(where), "a cell is a rectangle"


def test_evenly() -> None:
    assert evenly(8, 4).tolist() == [0, 2, 4, 6]
    assert evenly(9, 3).tolist() == [1, 4, 7]
    assert evenly(5, 5).tolist() == list(range(5))
    for n in range(1, 30):
        for k in range(1, n + 1):
            chosen = evenly(n, k)
            gaps = torch.diff(chosen)
            assert chosen.numel() == k
            assert k == 1 or (int(gaps.min()) >= 1 and int(gaps.max()) <= -(-n // k) + 1)
