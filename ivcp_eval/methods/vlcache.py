"""Keeps, in every layer's cache and head, the visual tokens that the question attends to; dense layers keep more.

Paper: https://arxiv.org/abs/2410.23317 (VL-Cache: budgets of layers by sparsity, scores by post-vision attention).
Reference: none of the authors; the paper's formulas, as EffiVLM-Bench ports them

The prompt is processed whole. Of each layer's attention the rows of the tokens behind the last image count. Its density
1 - gamma is the share of their causal entries that reach ``threshold`` of their row's largest one, mean over heads. Of
L layers at a mean share of alpha, one keeps clip(alpha L (1 - gamma) / sum(1 - gamma), 0.01, 1) of the visual tokens:
those with the most attention, added up over the same rows. The others leave the cache: memory is freed.

Differs: only visual tokens leave, all text stays, which takes the place of the paper's window of recent tokens; so this
is a variant. Budgets are shares of each image. Each key head keeps tokens of its own, by the mean of the query heads
that read it; ``heads="shared"`` is one choice for all. As in the paper nothing makes up for what the clip takes away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Faithfulness, ModelFacts, Selection, Signals
from ivcp_eval.interface.ops import budget
from ivcp_eval.methods._evicting import Evictor

ROWS = 64  # of the attention map that are there at a time
LEAST = 0.01  # share of the visual tokens that every layer keeps


@dataclass(frozen=True)
class Method(Evictor):
    """VL-Cache.

    Attributes:
        threshold: p, the share of a row's largest attention below which an entry counts as zero.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    threshold: float = 0.01

    def __post_init__(self) -> None:
        """Refuse a threshold under which nothing or everything would be zero."""
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be above 0 and at most 1")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """An eviction in every layer, once all have shown how sparse they are."""
        return tuple(replace(cut, late=True) for cut in super().cuts(model, ratio))

    def observe(self, signals: Signals) -> None:
        """Remember how dense the layer is and what is looked at."""
        strong = weight = torch.zeros((), device=signals.visual.device)
        for rows in signals.question.split(ROWS):
            attention = signals.attention(rows)  # (H, r, n)
            least = self.threshold * attention.amax(dim=-1, keepdim=True)
            strong = strong + (attention >= least).sum(dim=(1, 2)).float().mean()
            weight = weight + attention[:, :, signals.visual].sum(dim=1)
        signals.memory.setdefault("dense", []).append(strong / (signals.question + 1).sum())
        signals.memory.setdefault("weight", []).append(weight)
        signals.memory["groups"] = self.groups(signals)

    def weigh(self, signals: Signals) -> Tensor:
        """Attention from behind the images."""
        weight: Tensor = signals.memory["weight"][signals.stage]
        return weight

    def select(self, signals: Signals) -> Selection:
        """The layer's own share of every image."""
        assert signals.cut is not None
        if "shares" not in signals.memory:
            dense = torch.stack(signals.memory["dense"])
            if not bool(dense.any()):  # of attention that is NaN no entry counts
                dense = torch.ones_like(dense)
            signals.memory["shares"] = (signals.cut.ratio * dense / dense.mean()).clamp(LEAST, 1).tolist()
        share = signals.memory["shares"][signals.stage]
        images = [replace(image, budget=budget(share, image.n_prompt)) for image in signals.images]
        keep = self.heaviest(self.weigh(signals), signals.memory["groups"], images)
        return Selection(keep, exact=False)
