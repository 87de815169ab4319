"""Keeps the visual tokens that the vision tower attends to, each next one as unlike those already kept as may be.

Paper: https://arxiv.org/abs/2602.13315 (section 3: importance and diversity by maximal marginal relevance).
Reference: https://github.com/Tencent/AngelSlim @ 67394ce (angelslim/compressor/token_compressor/algorithm/idpruner.py)

Importance, moved to 0..1 inside the image, times lambda, minus the largest cosine of a token's embedding to any that
is kept already, times 1 - lambda; the largest is kept next.

Differs: the released importance comes from VisionSelector's scorer, whose weights exist for one model. ``weights`` is
a file of such (`ivcp lab train visionselector`); without one importance is the attention of the vision tower (of the
class token, else received). Either way this is a variant. Each image has its own budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerSignal
from ivcp_eval.methods._at_input import AtInput, embeddings, importance
from ivcp_eval.methods._greedy import marginal_relevance
from ivcp_eval.methods._trained import Scorer, answer_of


@dataclass(frozen=True)
class Method(AtInput):
    """IDPruner.

    Attributes:
        weights: file of VisionSelector's scorer; None: the tower's attention.
        importance: lambda, the weight of importance; the rest is diversity's.
        together: how many tokens are chosen at a time.
    """

    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    weights: Path | None = None
    importance: float = 0.5
    together: int = 1

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if not 0 <= self.importance <= 1 or self.together < 1:
            raise ValueError(f"importance={self.importance} must lie in 0..1, together={self.together} be 1 or more")

    @property
    def needs(self) -> frozenset[Signal]:  # type: ignore[override] # follows from a parameter
        """The vision tower, where its attention stands for the scorer."""
        return frozenset() if self.weights else frozenset({"vision"})

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """Maximal marginal relevance."""
        states = embeddings(signals, image)
        if self.weights is None:
            score = importance(signals, image).float()
        else:
            score = answer_of(self.weights, "visionselector", Scorer, states)
        finite = score.isfinite()
        low = torch.where(finite, score, torch.inf).amin()
        high = torch.where(finite, score, -torch.inf).amax()
        relevance = torch.where(finite, (score - low) / (high - low + 1e-6), torch.nan)
        return marginal_relevance(states, relevance, image.budget, 1 - self.importance, self.together)
