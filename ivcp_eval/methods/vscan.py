"""Keeps visual tokens of a local and a global scan of the vision tower, merges the rest into them, then cuts again.

Paper: https://arxiv.org/abs/2505.22654 (section 3: local and global scan, token merging, middle layer pruning).
Reference: https://github.com/Tencent/SelfEvolvingAgent @ a82450e (VScan/llava/model/llava_arch.py,
VScan/qwen/model/qwen2_5_vl_utils.py)

Half of the first budget are the tokens of most attention in an early block of the tower, so many in each window of the
image; the other half have most attention in the deep block. With a class token (CLIP: blocks 5 and 22 of 24) that is
its attention, and 4 x 4 windows get equal parts; else (Qwen2.5-VL: the first and the last block whose attention spans
the image) it is the received attention, windows are 4 x 4 tokens, and tokens are taken in order of attention while
their window has less than its part. Every other token joins the one that stays most like it, and a group lives on as
its mean. Before the middle layer (16 of 32, 14 of 28) the last token's attention drops more.

The retention ratio is what is left at the end. Before that stay, by the published pairs 1/6 with 1/18 (LLaVA,
Qwen2.5-VL) and 0.6 with 0.402 (RefCOCO), a power of it between these.

Differs: parts that do not come out even are filled by the global scan. The second cut ranks with RoPE on every family
(the Qwen2.5-VL code without), by the layer before. An image that is no grid (tiles, newlines) is one row of windows.
Each image has its own budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import (
    Cut,
    Faithfulness,
    Image,
    ModelFacts,
    Selection,
    Signal,
    Signals,
    TowerFacts,
    TowerSignal,
)
from ivcp_eval.interface.ops import (
    best_of_rest,
    group_means,
    last_token,
    mean_attention,
    nearest_of,
    place_in_group,
    top_of_each_image,
)
from ivcp_eval.methods._at_input import AtInput, embeddings, equal_windows, importance, square_windows

WINDOWS = 4  # a side of the image, or tokens a side of a window
POWER = math.log(0.6 * 6) / math.log(0.402 * 18)


@dataclass(frozen=True)
class Method(AtInput):
    """VScan.

    Attributes:
        first: share of the tokens that the first cut leaves; None lies between the published pairs.
        depth: of the early block, as a share of the tower's blocks; the first one whose attention spans the image.
        layer: decoder layer before which the second cut is; None is the middle one.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision", "query", "key"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    first: float | None = None
    depth: float = 5 / 24
    layer: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if (self.first is not None and not 0 < self.first <= 1) or not 0 <= self.depth < 1:
            raise ValueError(f"first={self.first} must lie in (0, 1], depth={self.depth} in [0, 1)")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One at the input, one in the middle."""
        first = min(1.0, (18 * ratio) ** POWER / 6) if self.first is None else self.first
        layer = max(model.first_cut + 1, model.n_layers // 2) if self.layer is None else self.layer
        renumber = model.renumbers(self.renumber)
        return (
            Cut(model.first_cut, max(ratio, first), renumber=renumber),
            Cut(layer, ratio, cache="from_cut", renumber=renumber),
        )

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        """An early block and the deep one."""
        return {"": tower.own, "early": tower.at(self.depth)}

    def select(self, signals: Signals) -> Selection:
        """Both scans; the last token's attention in the second stage."""
        if signals.stage == 0:
            return super().select(signals)
        return Selection(top_of_each_image(mean_attention(signals, last_token(signals)), signals.images))

    def choose(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """What the two scans find, and the means of what joins it."""
        early, deep = importance(signals, image, "early"), importance(signals, image)
        equal = "cls" in signals.vision
        window = equal_windows(image, WINDOWS) if equal else square_windows(image, WINDOWS)
        n_windows, half = int(window.max()) + 1, image.budget // 2
        limit = half // n_windows if equal else -(-half // n_windows)
        allowed = place_in_group(early, window) < limit
        local = best_of_rest(early, ~allowed, min(half, int(allowed.sum())))
        taken = torch.zeros_like(allowed)
        taken[local] = True
        kept = torch.cat((local, best_of_rest(deep, taken, image.budget - local.numel()))).sort().values
        states = embeddings(signals, image)
        group = nearest_of(states, states[kept])
        group[kept] = torch.arange(kept.numel(), device=kept.device)
        return kept, group_means(group, kept.numel())
