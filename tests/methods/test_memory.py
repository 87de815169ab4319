"""What methods allocate to choose and merge grows with the prompt, not with its square."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ivcp_eval.engine.signals.vision import received
from ivcp_eval.interface import Signals, ops
from ivcp_eval.interface.ops import merged_states
from ivcp_eval.interface.registry import PLUS_IVC, make_method
from tests.methods.material import random_clips, random_signals
from tests.methods.test_degenerate import CHOOSING, CLIPS, chosen


class Largest(TorchDispatchMode):
    """The most numbers that any one operation returned in one tensor."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("name", [*CHOOSING, "visionzip" + PLUS_IVC])
def test_no_map_of_the_prompt(name: str) -> None:
    signals = random_signals((32, 32), ratio=0.5, question=200)
    with Largest() as largest:
        selection = chosen(name, signals)
        if selection.merge is not None:
            for merge in [selection.merge] if selection.keep.ndim == 1 else selection.merge:
                merged_states(merge, signals.hidden[signals.visual])
    assert 0 < largest.numbers < signals.hidden.shape[0] ** 2 / 4


@pytest.mark.parametrize("name", CHOOSING)
def test_a_few_rows_at_a_time_are_all_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared in blocks of rows does not depend on how many these are."""

    def row() -> Signals:
        return random_signals((9, 11), (5, 8), ratio=0.4, question=9, seed=2)

    whole = chosen(name, row())
    for module in [module for file, module in sys.modules.items() if file.startswith("ivcp_eval.")]:
        if vars(module).get("block_rows") is ops.block_rows and module is not ops:
            monkeypatch.setattr(module, "block_rows", lambda n: 7)
    monkeypatch.setattr(ops, "block_rows", lambda n: 7)
    blocks = chosen(name, row())
    assert blocks.keep.tolist() == whole.keep.tolist()
    if whole.merge is not None and blocks.merge is not None:
        torch.testing.assert_close(blocks.merge.to_dense(), whole.merge.to_dense())


@pytest.mark.parametrize("name", CLIPS)
def test_no_map_of_a_video(name: str) -> None:
    signals = random_clips((16, 8, 9), ratio=0.3)
    with Largest() as largest:
        selection = chosen(name, signals)
        if selection.merge is not None:
            merged_states(selection.merge, signals.hidden[signals.visual])
    assert 0 < largest.numbers < signals.hidden.shape[0] ** 2 / 4


def test_no_map_of_the_patches() -> None:
    query, key = (torch.randn(4, 2048, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with Largest() as largest:
        total = received(query, key)
    assert float(total.sum()) == pytest.approx(2048, rel=1e-4)
    assert largest.numbers <= 2**20


def test_sparsevlm_by_rank() -> None:
    signals = random_signals((32, 32), ratio=0.5, question=400, stage=1)
    signals.memory["raters"] = torch.arange(3, 403)  # every token of the question
    with Largest() as largest:
        make_method("sparsevlm", {"counts": "rank"}).select(signals)
    assert 0 < largest.numbers < signals.hidden.shape[0] ** 2 / 4
