"""Keeps the visual tokens that cover the others best by likeness, each gain weighed by the vision tower's attention.

Paper: https://arxiv.org/abs/2510.24214 (section 3: set coverage and saliency, picked greedily).
Reference: https://github.com/kinredon/SCOPE @ 6bf7306 (scope/clip_encoder.py, ``SCOPE``, COMBINED=multi)

A token's gain is the sum, over all tokens of the image, of how far its cosine to them exceeds the largest one of any
token chosen so far (at least 0), times its attention to the power of alpha. The largest gain is chosen next. Features
are those of the block that the projector reads, attention the class token's in it.

Differs: without a class token the attention is the received one. The class token itself is no visual token. Each image
has its own budget, for which its tiles compete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerSignal
from ivcp_eval.methods._at_input import AtInput, importance
from ivcp_eval.methods._greedy import coverage


@dataclass(frozen=True)
class Method(AtInput):
    """SCOPE.

    Attributes:
        alpha: power of the attention; 0 is coverage alone.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls", "feature"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    alpha: float = 1.0

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """Greedy coverage of the image's features."""
        weight = importance(signals, image) ** self.alpha
        return coverage(signals.vision["feature"][image.tokens], weight, image.budget)
