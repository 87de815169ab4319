"""Keeps the visual tokens that a middle block of the vision tower attends to, their neighbours, and a deep block's.

Paper: https://arxiv.org/abs/2508.00553 (section 3: anchor, buffer and register tokens).
Reference: https://github.com/Danielement321/HiPrune @ 6e83a12 (LLaVA/llava/model/llava_arch.py, ``encode_images``, and
Qwen2_5_VL/qwen2_5_vl_HiPrune.py)

Anchors, one in five of a share alpha of the budget, receive most attention in a middle block (index 8 of CLIP's 24, 15
of Qwen2.5-VL's 32); with each stay the tokens left, right, above and below it. What receives most attention in the
deep block (the one that the projector reads, in Qwen2.5-VL the last) fills the budget. Neighbours wrap over the ends
of rows and pile up on the first and the last token of the image, as released.

Differs: an anchor or neighbour is never counted twice; the released Qwen2.5-VL code takes 1 off its deep attention, a
sum over queries, which need not keep it out. Images that are no grid (tiles, newlines) have the width of a square.
Each image has its own budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerFacts, TowerSignal
from ivcp_eval.interface.ops import filled_up, ranking, to_device
from ivcp_eval.methods._at_input import AtInput


@dataclass(frozen=True)
class Method(AtInput):
    """HiPrune.

    Attributes:
        alpha: share of the budget for anchors and their neighbours.
        depth: of the middle block, as a share of the tower's blocks; the first one whose attention spans the image.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    alpha: float = 0.1
    depth: float = 8 / 24

    def __post_init__(self) -> None:
        """Refuse shares outside 0..1."""
        if not 0 <= self.alpha <= 1 or not 0 <= self.depth < 1:
            raise ValueError(f"alpha={self.alpha} must lie in 0..1, depth={self.depth} in [0, 1)")

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        """A middle block and the deep one."""
        return {"": tower.own, "middle": tower.at(self.depth)}

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """Anchors with their neighbours, then the deep block's."""
        middle, deep = (signals.vision[name][image.tokens] for name in ("middle/received", "received"))
        n, budget = deep.numel(), image.budget
        width = image.span.grid[1] if image.span.grid else math.isqrt(n)
        anchors = ranking(middle)[: min(round(budget * self.alpha / 5), budget // 5)]
        around = anchors[:, None] + to_device(torch.tensor([0, -1, 1, -width, width]), anchors.device)
        kept = torch.zeros(n, dtype=torch.bool, device=deep.device)
        kept[around.clamp(0, n - 1).flatten()] = True
        return filled_up(deep, kept, budget)
