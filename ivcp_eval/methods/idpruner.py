"""Keeps the visual tokens that the vision tower attends to, each next one as unlike those already kept as may be.

Paper: https://arxiv.org/abs/2602.13315 (section 3: importance and diversity by maximal marginal relevance).
Reference: https://github.com/Tencent/AngelSlim @ 67394ce (angelslim/compressor/token_compressor/algorithm/idpruner.py)

Importance, moved to 0..1 inside the image, times lambda, minus the largest cosine of a token's embedding to any that
is kept already, times 1 - lambda; the largest is kept next.

Differs: the released importance comes from a trained selector that exists for one model; here it is the attention of
the vision tower (of the class token, else received), which makes this a variant. Each image has its own budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerSignal
from ivcp_eval.methods._at_input import AtInput, embeddings, importance
from ivcp_eval.methods._greedy import marginal_relevance


@dataclass(frozen=True)
class Method(AtInput):
    """IDPruner.

    Attributes:
        importance: lambda, the weight of importance; the rest is diversity's.
        together: how many tokens are chosen at a time.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    importance: float = 0.5
    together: int = 1

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if not 0 <= self.importance <= 1 or self.together < 1:
            raise ValueError(f"importance={self.importance} must lie in 0..1, together={self.together} be 1 or more")

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """Maximal marginal relevance."""
        score = importance(signals, image).float()
        finite = score.isfinite()
        low = torch.where(finite, score, torch.inf).amin()
        high = torch.where(finite, score, -torch.inf).amax()
        relevance = torch.where(finite, (score - low) / (high - low + 1e-6), torch.nan)
        return marginal_relevance(
            embeddings(signals, image), relevance, image.budget, 1 - self.importance, self.together
        )
