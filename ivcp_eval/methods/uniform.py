"""Keeps visual tokens spread evenly over the grid of each image, whatever it shows.

Differs: nothing to differ from; a control. The grid is cut into as many compact cells as tokens may stay, and the
middle of each is kept; images without a grid are taken as one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, ModelFacts, Selection, Signals
from ivcp_eval.interface.ops import image_partition


@dataclass(frozen=True)
class Method(AbstractMethod):
    """Uniform selection.

    Attributes:
        layer: decoder layer whose input is cut; None is the first that can be cut, usually the model's input.
    """

    faithfulness: ClassVar[Faithfulness] = "control"

    layer: int | None = None

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for every layer's cache."""
        return (Cut(model.first_cut if self.layer is None else self.layer, ratio),)

    def select(self, signals: Signals) -> Selection:
        """The middle of every cell."""
        kept = [image.tokens[image_partition(image)[1]] for image in signals.images]
        return Selection(torch.cat(kept).sort().values)
