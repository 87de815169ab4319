"""Keeps the input embeddings that are least like a few pivots of large L1 norm, as TensorRT Edge-LLM ships DART.

Paper: https://arxiv.org/abs/2502.11494 (section 3.3), from which the product departs; `dart` is the paper's.
Reference: https://github.com/nvluxiaoz/TensorRT-Edge-LLM @ 2add2e2 (a copy of 0.11; ``--visualPrune``:
cpp/runtime/preprocess/dartPruner.h and visualTokenPruner.h, and the reference selection of their unit tests)

Before the first decoder layer: pivots are the image's four tokens and the prompt's four text tokens of the largest L1
norm. Pivot after pivot, image pivots first, takes the tokens of the lowest cosine to it among those that are left, its
share of what is left to choose rounded up. Each image has its own budget; text pivots are shared; positions stay.

Differs: an image's share is rounded half to even, there up; prompts of fewer than 16 visual tokens are left alone
there. Families that add visual features in their first layers are cut after these; there, these features are dropped
with their tokens at the input. Norms and cosines are those of the states that enter the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signals
from ivcp_eval.interface.ops import best_of_rest, ranking, unit_rows
from ivcp_eval.methods._at_input import AtInput


@dataclass(frozen=True)
class Method(AtInput):
    """DART of TensorRT Edge-LLM.

    Attributes:
        pivot_image, pivot_text: how many pivots of an image and of the text.
        renumber: number the survivors 0..n-1; the product never does.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    renumber: bool | None = False
    pivot_image: int = 4
    pivot_text: int = 4

    def __post_init__(self) -> None:
        """Refuse no image pivot."""
        if self.pivot_image < 1 or self.pivot_text < 0:
            raise ValueError(
                f"pivot_image={self.pivot_image} must be 1 or more, pivot_text={self.pivot_text} 0 or more"
            )

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """Pivots and what they take."""
        norm, at = signals.hidden.float().abs().sum(dim=1), signals.visual[image.tokens]
        own = ranking(norm[at])[: min(self.pivot_image, image.budget)]
        pivots = torch.cat((at[own], signals.text[ranking(norm[signals.text])[: self.pivot_text]]))
        taken = torch.zeros(at.numel(), dtype=torch.bool, device=at.device)
        taken[own] = True
        unlike = -(unit_rows(signals.hidden[at]) @ unit_rows(signals.hidden[pivots]).T)
        left = image.budget - own.numel()
        for number in range(len(pivots)):
            share = -(-left // (len(pivots) - number))
            taken[best_of_rest(unlike[:, number], taken, share)] = True
            left -= share
        return taken.nonzero().flatten()
