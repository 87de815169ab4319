"""Keeps visual tokens that stand out and match the question, then grows the regions around them.

Paper: https://arxiv.org/abs/2605.20950 (focus then context; the abstract only, formulas are not public).
Reference: none; no code is public

Focus: half of the budget are the tokens of the largest product of saliency, the attention of the vision tower, and
relevance, the cosine to the question's mean embedding, both moved to 0..1 inside the image. Context: in four rounds the
tokens that touch what is kept so far are looked at, and the best of these by the same product join it.

Differs: the paper's words are a saliency times a semantic relevance, a structural scan of what surrounds the focus, and
progress in steps; how each of them is computed is ours, so this is a variant by name. Where the rounds run out of
neighbours the best of all others fill the budget. Images that are no grid (tiles, newlines) are one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import best_of_rest, unit_range
from ivcp_eval.methods._at_input import AtInput, grid_of, importance, relevance


@dataclass(frozen=True)
class Method(AtInput):
    """SPpruner's idea.

    Attributes:
        focus: share of the budget for the focus; half, since neither of the two stages is said to weigh more.
        rounds: how often the regions grow by one token on every side; more reach farther from the focus.
        relevant: power of relevance in the product; 0 leaves saliency alone.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    focus: float = 0.5
    rounds: int = 4
    relevant: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if not 0 <= self.focus <= 1 or self.rounds < 0 or not self.relevant >= 0:
            raise ValueError(
                f"focus={self.focus} must lie in 0..1, rounds={self.rounds} and relevant={self.relevant} be 0 or more"
            )

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """The focus, and what grows around it."""
        score = unit_range(importance(signals, image)) * relevance(signals, image) ** self.relevant
        taken = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
        count = max(1, round(self.focus * image.budget))
        taken[best_of_rest(score, taken, count)] = True
        context = image.budget - count
        for left in range(self.rounds - 1, -1, -1):
            around = touched(taken, grid_of(image))
            new = best_of_rest(
                score, ~around, min(int(around.sum()), image.budget - context * left // self.rounds - count)
            )
            taken[new], count = True, count + new.numel()
        taken[best_of_rest(score, taken, image.budget - count)] = True
        return taken.nonzero().flatten()


def touched(taken: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N,) bool: the tokens of a grid beside, above, below or diagonal to one of ``taken`` (N,), and not of them."""
    near = torch.nn.functional.max_pool2d(taken.view(1, 1, *grid).float(), 3, stride=1, padding=1)
    return (near.flatten() > 0) & ~taken
