"""Keeps the visual tokens that the vision tower attends to most, and of the others those that are no duplicates.

Paper: https://arxiv.org/abs/2412.01818 (section 3: important tokens by attention, diverse tokens by removing
duplicates).
Reference: https://github.com/Theia-4869/VisPruner @ aefa01a (llava/model/llava_arch.py, ``encode_images``)

The tokens are ordered by the class token's attention in the block that the projector reads, mean over heads (without a
class token: received attention); the first half of the budget is important. The rest loses its duplicates, round by
round: every second token is compared with the others by the cosine of the tower's features, and those most like any of
them leave, 8 in a round. The survivors of a round are listed by descending likeness, before those they were compared
with, which is what the next round begins with.

Differs: an image of more than 576 tokens loses as many times 8 in a round as it is larger, so that the number of
rounds does not grow. Each image has its own budget, for which its tiles compete; the released code gives every crop
the same. An odd number of candidates, on which the released code fails, is no special case. Likeness is float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import max_similarity, ranking, unit_rows
from ivcp_eval.methods._at_input import AtInput, importance

RELEASED_TOKENS = 576  # of an image in the released runs


@dataclass(frozen=True)
class Method(AtInput):
    """VisPruner.

    Attributes:
        important: share of the budget that attention fills.
        per_round: duplicates that leave in a round, for every 576 tokens of the image.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls", "feature"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    important: float = 0.5
    per_round: int = 8

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if not 0 <= self.important <= 1 or self.per_round < 1:
            raise ValueError(f"important={self.important} must lie in 0..1, per_round={self.per_round} be 1 or more")

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """The most attended tokens, and the rest without duplicates."""
        order = ranking(importance(signals, image))
        n_important = int(image.budget * self.important)
        n_diverse, rest = image.budget - n_important, order[n_important:]
        if not n_diverse:
            return order[:n_important]
        unit = unit_rows(signals.vision["feature"][image.tokens])
        per_round = self.per_round * max(1, -(-order.numel() // RELEASED_TOKENS))
        while rest.numel() > n_diverse:
            compared, others = rest[::2], rest[1::2]
            likeness = ranking(max_similarity(unit[compared], unit[others]))
            rest = torch.cat((compared[likeness[min(per_round, rest.numel() - n_diverse) :]], others))
        return torch.cat((order[:n_important], rest))
