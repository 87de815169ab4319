"""Averages neighbouring visual tokens: as many compact cells of the grid as tokens may stay, each its mean.

Differs: nothing to differ from; a control. The cells are those of `uniform`; the mean stands at the middle of its
cell, whose position it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, ModelFacts, Selection, Signals
from ivcp_eval.interface.ops import group_means, image_partition, merged_selection


@dataclass(frozen=True)
class Method(AbstractMethod):
    """Average pooling.

    Attributes:
        layer: decoder layer whose input is pooled; None is the first that can be cut, usually the model's input.
    """

    faithfulness: ClassVar[Faithfulness] = "control"

    layer: int | None = None

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for every layer's cache."""
        return (Cut(model.first_cut if self.layer is None else self.layer, ratio),)

    def select(self, signals: Signals) -> Selection:
        """The mean of every cell, at its middle."""
        kept, weights = [], []
        for image in signals.images:
            group, centre = image_partition(image)
            kept.append(centre)
            weights.append(group_means(group, image.budget))
        return Selection(*merged_selection(kept, weights, signals.images))
