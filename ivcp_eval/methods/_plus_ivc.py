"""A scoring method with IVC-Prune's coordinate tokens forced into what it keeps.

Paper: https://arxiv.org/abs/2602.03060 (ablation: FastV + IVC, PyramidDrop + IVC).
Reference: https://github.com/FireRedTeam/IVC-Prune @ 03afd9c has no code for it.

In every image and at every cut the coordinate set of `ivc_prune` stays, and the method's own lowest-scored tokens
leave to hold the budget.

Differs: the paper does not say how large the set is beside another method; here it is `ivc_prune`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, AbstractScorer, Cut, Faithfulness, ModelFacts, Signal, Signals
from ivcp_eval.ops import coordinate_set
from ivcp_eval.registry import PLUS_IVC, method_name


@dataclass(frozen=True)
class PlusIvc(AbstractScorer):
    """A scorer and the implicit visual coordinates.

    Attributes:
        inner: the method that scores and says where to cut.
        ivc: share of an image's tokens kept for each of the two coordinate scores.
        ivc_share: upper bound of each, as a share of the image's budget.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    inner: AbstractMethod
    ivc: float = 0.1
    ivc_share: float = 0.2

    if not TYPE_CHECKING:  # a class variable of the base; here it is the inner method's

        @property
        def needs(self) -> frozenset[Signal]:
            """What the inner method needs; rotary angles need no capture."""
            return self.inner.needs

    def __post_init__(self) -> None:
        """Refuse methods that return sets, and shares outside 0..1."""
        if not isinstance(self.inner, AbstractScorer):
            raise ValueError(
                f"{method_name(self.inner)!r} returns sets, not scores, so it has no lowest-scored tokens to drop for "
                f"the coordinates; {PLUS_IVC} works with methods that are an AbstractScorer"
            )
        for name in ("ivc", "ivc_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside 0..1")

    @property
    def name(self) -> str:
        """``fastv+ivc``: what users type and the CSV says."""
        return method_name(self.inner) + PLUS_IVC

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Those of the inner method."""
        return self.inner.cuts(model, ratio)

    def score(self, signals: Signals) -> Tensor:
        """The inner scores, infinite for coordinate tokens."""
        assert isinstance(self.inner, AbstractScorer)
        score = self.inner.score(signals).float().clone()
        cos, sin = (part.mean(dim=(0, 2))[signals.visual] for part in signals.rope())
        for image in signals.images:
            forced = coordinate_set(cos[image.tokens], sin[image.tokens], image, self.ivc, self.ivc_share)
            score[image.tokens[forced]] = torch.inf
        return score
