"""Keeps visual tokens spread evenly over every frame, other ones from frame to frame, so that in time all are seen.

Differs: nothing to differ from; a control. The cells are those of `uniform`; of each cell one token stays, the middle
one in the first frame, in each frame the next one of the cell, in row-major order. Of a picture the tokens of `uniform`
stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, Image, ModelFacts, Selection, Signals
from ivcp_eval.interface.ops import image_partition, place_in_group


@dataclass(frozen=True)
class Method(AbstractMethod):
    """Uniform selection that moves on from frame to frame.

    Attributes:
        layer: decoder layer whose input is cut; None is the first that can be cut, usually the model's input.
    """

    faithfulness: ClassVar[Faithfulness] = "control"
    for_videos: ClassVar[bool] = True

    layer: int | None = None

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for every layer's cache."""
        return (Cut(model.first_cut if self.layer is None else self.layer, ratio),)

    def select(self, signals: Signals) -> Selection:
        """One token of every cell."""
        kept = [image.tokens[_staggered(image)] for image in signals.images]
        return Selection(torch.cat(kept).sort().values)


def _staggered(image: Image) -> Tensor:
    """(K,) of each cell the token that is the frame's turn."""
    group, centre = image_partition(image)
    place = place_in_group(torch.zeros_like(group), group)
    turn = 0 if image.span.frame is None else image.span.frame.index
    target = (place[centre] + turn) % torch.bincount(group)
    return (place == target[group]).nonzero().flatten()
