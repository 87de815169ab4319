"""Lets most layers attend, in each decode step, to the few visual tokens that focal layers found; all tokens stay.

Paper: https://arxiv.org/abs/2605.17447 (focal-guided pruning, cross-step fixation reuse).
Reference: none; only the abstract is public.

A focal layer attends to every visual token. The best tokens by the attention of the focal layers that ran so far in the
step are what the other layers attend to; those before the first focal layer go on with the tokens of the step before.
Nothing is evicted: what would be saved is reading the cache, and how much was attended to is measured and reported as
analytic. The retention ratio is the share of a row's visual tokens that such a layer attends to; the paper's setting
reads 5 % in all.

Differs: which layers are focal, how their attention is joined and how many tokens are taken is not public. Here focal
layers lie at ``focal`` shares of the depth; their attention over visual tokens alone, mean over heads, adds up in the
step; before the first focal layer of the first step all tokens are attended to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signal, Step
from ivcp_eval.interface.ops import budget, top
from ivcp_eval.methods._uncut import Uncut


@dataclass(frozen=True)
class Method(Uncut):
    """FastOCR.

    Attributes:
        focal: where the focal layers are, as shares of the decoder's depth, increasing.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"step"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    focal: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        """Refuse shares that are no places in a decoder."""
        object.__setattr__(self, "focal", tuple(self.focal))
        inside = all(0 <= share < 1 for share in self.focal)
        if not self.focal or not inside or list(self.focal) != sorted(set(self.focal)):
            raise ValueError(f"focal={self.focal} must be increasing shares of the decoder's depth in [0, 1)")

    def attended(self, step: Step) -> Tensor | None:
        """Everything in a focal layer, else what was found last."""
        focal = {int(share * step.n_layers) for share in self.focal}
        if step.layer == 0:
            step.memory["score"] = None
        if step.layer - 1 in focal:
            self._fixate(step)
        return None if step.layer in focal else step.memory.get("fixation")

    def _fixate(self, step: Step) -> None:
        attention = step.logits().softmax(dim=1).mean(dim=0)
        earlier = step.memory["score"]
        score = step.memory["score"] = attention if earlier is None else earlier.to(attention.device) + attention
        fixation = torch.zeros(score.numel(), dtype=torch.bool)
        fixation[top(score, budget(step.ratio, score.numel())).cpu()] = True
        step.memory["fixation"] = fixation
