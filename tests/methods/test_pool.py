"""Oracle: torch's own average pooling where the cells are equal, explicit means elsewhere."""

from __future__ import annotations

import torch

from ivcp_eval.interface.ops import partition
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_signals


def test_equals_avg_pool2d() -> None:
    signals = random_signals((4, 6), ratio=0.25)
    selection = make_method("pool").select(signals)
    assert selection.merge is not None
    visual = signals.hidden[signals.visual]
    wanted = torch.nn.functional.avg_pool2d(visual.T.reshape(1, -1, 4, 6), 2)[0].flatten(1).T
    assert torch.allclose(selection.merge @ visual, wanted, atol=1e-6)
    assert selection.keep.tolist() == [0, 2, 4, 12, 14, 16]


def test_uneven_cells_and_two_images() -> None:
    signals = random_signals((3, 5), (2, 3), ratio=0.4)
    selection = make_method("pool").select(signals)
    assert selection.merge is not None
    visual = signals.hidden[signals.visual]
    got, row = selection.merge @ visual, 0
    for offset, (rows, columns), kept in ((0, (3, 5), 6), (15, (2, 3), 2)):
        group, _ = partition(rows, columns, kept)
        for cell in range(kept):
            members = [offset + i for i, g in enumerate(group.tolist()) if g == cell]
            assert int(selection.keep[row]) in members
            assert torch.allclose(got[row], sum(visual[i] for i in members) / len(members), atol=1e-6)
            row += 1
