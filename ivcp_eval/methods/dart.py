"""Keeps the visual tokens that are least like a few pivots, the tokens of the largest keys, in an early decoder layer.

Paper: https://arxiv.org/abs/2502.11494 (section 3.3: pivots by key norm, tokens of low duplication with each).
Reference: https://github.com/xqy1111111/DART @ d6a5af6 (llava/model/language_model/modeling_llama_self.py, a fork),
and its port to Qwen2.5-VL in https://github.com/Chenfei-Liao/VTC-Bench @ 983e443 (external/DART)

Before layer K (2 is released) the key norm of a token is the L1 norm of its keys in layer K-1, RoPE applied, over all
heads. Pivots are the four image tokens and the four tokens behind the image of the largest norm. Pivot after pivot, in
the order in which Python iterates a set of their columns (it changes the outcome), takes as many image tokens of the
lowest cosine to it as its share is, of the states entering layer K after the model's final norm. Positions stay; the
caches of layers before K stay whole.

Differs: the budget is met exactly, the first pivots taking one token more; the released code keeps 4 + 8 * int(budget
/ 8), its LLaVA scripts 132 whatever the ratio. Each image has its own budget, and its text pivots stand behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, Image, ModelFacts, Selection, Signal, Signals
from ivcp_eval.interface.ops import best_of_rest, ranking, unit_rows


@dataclass(frozen=True)
class Method(AbstractMethod):
    """DART.

    Attributes:
        layer: K, the decoder layer whose input is cut; at least 1. Families whose first layers cannot be cut are cut
            after these.
        pivot_image, pivot_text: how many pivots of the image and of the text behind it.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"key"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    layer: int = 2
    pivot_image: int = 4
    pivot_text: int = 4

    def __post_init__(self) -> None:
        """Refuse a layer without one before it, and no image pivot."""
        if self.layer < 1 or self.pivot_image < 1 or self.pivot_text < 0:
            raise ValueError(
                f"layer={self.layer} and pivot_image={self.pivot_image} must be 1 or more, pivot_text="
                f"{self.pivot_text} 0 or more"
            )

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut; earlier caches keep everything."""
        return (Cut(max(self.layer, model.first_cut), ratio, cache="from_cut"),)

    def select(self, signals: Signals) -> Selection:
        """Pivots and what they take, image by image."""
        assert signals.key is not None
        assert signals.rotate is not None
        assert signals.normed is not None
        norm = signals.rotate(signals.key).float().abs().sum(dim=(0, 2))
        unit = unit_rows(signals.normed())
        kept = [image.tokens[self._of_image(signals, image, norm, unit)] for image in signals.images]
        return Selection(torch.cat(kept).sort().values)

    def _of_image(self, signals: Signals, image: Image, norm: Tensor, unit: Tensor) -> Tensor:
        at = signals.visual[image.tokens]
        behind = signals.text[signals.text > at[-1]]
        own = ranking(norm[at])[: min(self.pivot_image, image.budget)]
        text = behind[ranking(norm[behind])[: self.pivot_text]]
        pivots = list(set(at[own].tolist() + text.tolist()))
        taken = torch.zeros(at.numel(), dtype=torch.bool, device=at.device)
        taken[own] = True
        unlike = -(unit[at] @ unit[pivots].T)
        share, more = divmod(image.budget - own.numel(), len(pivots))
        for number in range(len(pivots)):
            taken[best_of_rest(unlike[:, number], taken, share + (number < more))] = True
        return taken.nonzero().flatten()
