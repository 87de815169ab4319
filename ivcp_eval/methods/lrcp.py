"""Keeps the visual tokens farthest from the main directions of all, and merges the others into those most like them.

Paper: https://arxiv.org/abs/2605.15621 (squared residual off the principal subspace, nearest-neighbour merging).
Reference: none of the authors; the equations as a third party's port for vLLM cites them

Embeddings are centred and projected off their first r principal directions; the squared length of what is left is a
token's score. The best stay; each other token joins the one most like it by cosine, and a group lives on as its mean.

Differs: that port halves a kept token which nothing joins, a slip that is not reproduced; its second cut inside the
language model is left out. The directions come from subspace iteration, which a full decomposition of many long
embeddings would take hundreds of times as long for. Each image has its own budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signals
from ivcp_eval.interface.ops import group_means, nearest_of, top
from ivcp_eval.methods._at_input import AtInput, embeddings

EXTRA, ROUNDS = 16, 24  # further directions that are followed, and iterations: the error falls below float32's


@dataclass(frozen=True)
class Method(AtInput):
    """LRCP.

    Attributes:
        rank: r, how many directions; None is 8 on Qwen's families and 4 elsewhere, as in the port.
    """

    faithfulness: ClassVar[Faithfulness] = "from_formula"

    rank: int | None = None

    def __post_init__(self) -> None:
        """Refuse a rank that leaves nothing to rank by."""
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} must be 1 or more")

    def choose(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """The largest residuals, and the means of what joins them."""
        states = embeddings(signals, image).float()
        kept = top(residual(states, self.rank or (8 if signals.family.startswith("qwen") else 4)), image.budget)
        group = nearest_of(states, states[kept])
        group[kept] = torch.arange(kept.numel(), device=kept.device)
        return kept, group_means(group, kept.numel())


def residual(states: Tensor, rank: int) -> Tensor:
    """(N,) squared length of each centred state (N, E) off the first ``rank`` principal directions; NaN if broken."""
    finite = states.isfinite().all(dim=1)
    centred = states.masked_fill(~finite[:, None], 0)
    centred = centred - centred.sum(dim=0) / finite.sum().clamp_min(1)
    seen = centred.masked_fill(~finite[:, None], 0)
    width = min(rank + EXTRA, *seen.shape)
    start = torch.randn(seen.shape[1], width, generator=torch.Generator().manual_seed(0)).to(seen)
    for _ in range(ROUNDS):
        start = torch.linalg.qr(seen.T @ (seen @ start)).Q
    turned = torch.linalg.svd(seen @ start, full_matrices=False).Vh[:rank]
    main = start @ turned.T  # (E, rank)
    left = (seen - (seen @ main) @ main.T).square().sum(dim=1)
    rounding = 1e-9 * seen.square().sum()  # all that is left of images of few tokens, and no ground to choose by
    return left.masked_fill(left < rounding, 0).masked_fill(~finite, torch.nan)
