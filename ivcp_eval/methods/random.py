"""Keeps visual tokens drawn at random: a method that is not better than this has not found anything.

Differs: nothing to differ from; a control. A row draws the same tokens in any batch; vary ``seed`` of `prune`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractScorer, Cut, Faithfulness, ModelFacts, Signals
from ivcp_eval.interface.ops import to_device


@dataclass(frozen=True)
class Method(AbstractScorer):
    """Random selection.

    Attributes:
        layer: decoder layer whose input is cut; None is the first that can be cut, usually the model's input.
    """

    faithfulness: ClassVar[Faithfulness] = "control"
    sweep_seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)

    layer: int | None = None

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for every layer's cache."""
        return (Cut(model.first_cut if self.layer is None else self.layer, ratio),)

    def score(self, signals: Signals) -> Tensor:
        """Uniform noise from the row's own generator."""
        return to_device(torch.rand(signals.n_visual, generator=signals.generator), signals.visual.device)
