"""Keeps the visual tokens that a small trained scorer ranks highest, before the language model runs.

Paper: https://arxiv.org/abs/2510.16598 (a scorer, trained through a differentiable top-k beside a frozen model).
Reference: https://github.com/JulietChoo/VisionSelector @ 800a70f (selector_scorer.py, selector_model.py)

A token's score is the mean, over the image's tokens, of the product of its query and their keys; two linear maps of the
embeddings, half as wide, make these. The largest scores stay.

Differs: the published weights are of a few models; `ivcp lab train visionselector` makes such for any, with the
authors' formulas and fewer examples: ``weights``. Without a file the score is the attention of the vision tower (of the
class token, else received), which is nothing of VisionSelector's but what its scorer has to beat. Both are variants.
Each image has its own budget, rounded, not rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import ranking
from ivcp_eval.methods._at_input import AtInput, embeddings, importance
from ivcp_eval.methods._trained import Scorer, answer_of


@dataclass(frozen=True)
class Method(AtInput):
    """VisionSelector.

    Attributes:
        weights: file of a scorer (`ivcp lab train visionselector`); None: the tower's attention.
    """

    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    weights: Path | None = None

    @property
    def needs(self) -> frozenset[Signal]:  # type: ignore[override] # follows from a parameter
        """The vision tower, where its attention stands for the scorer."""
        return frozenset() if self.weights else frozenset({"vision"})

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """The best scores."""
        if self.weights is None:
            scores = importance(signals, image)
        else:
            scores = answer_of(self.weights, "visionselector", Scorer, embeddings(signals, image))
        return ranking(scores)[: image.budget]
