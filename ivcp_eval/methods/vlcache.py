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
        strong, weight = [], []
        for rows in signals.question.split(ROWS):
            attention = signals.attention(rows)  # (H, r, n)
            strong.append((attention >= self.threshold * attention.amax(dim=-1, keepdim=True)).sum())
            weight.append(attention[:, :, signals.visual].sum(dim=1))
        signals.memory.setdefault("strong", []).append(sum(strong[1:], start=strong[0]))
        signals.memory.setdefault("weight", []).append(sum(weight[1:], start=weight[0]))
        signals.memory["groups"] = self.groups(signals)

    def weigh(self, signals: Signals) -> Tensor:
        """(L * H, V): attention from behind the images, layer after layer."""
        return torch.cat(signals.memory.pop("weight"))

    def select(self, signals: Signals) -> Selection:
        """The layer's own share of every image."""
        assert signals.cut is not None
        memory = signals.memory
        if "shares" not in memory:
            dense = torch.stack(memory["strong"]).float()  # of as many entries in every layer
            if not bool(dense.any()):  # of attention that is NaN no entry counts
                dense = torch.ones_like(dense)
            memory["shares"] = (signals.cut.ratio * dense / dense.mean()).clamp(LEAST, 1).tolist()
            memory["ranked"] = self.ranked(self.weigh(signals), len(dense) * memory["groups"], signals.images)
        share, groups = memory["shares"][signals.stage], memory["groups"]
        images = [replace(image, budget=budget(share, image.n_prompt)) for image in signals.images]
        own = [tokens[signals.stage * groups :][:groups] for tokens in memory["ranked"]]
        return Selection(self.best(own, images), exact=False)
