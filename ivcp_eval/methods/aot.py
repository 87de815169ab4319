"""Keeps anchors that the vision tower attends to, near and far, and moves the others into them by optimal transport.

Paper: https://arxiv.org/abs/2603.01400 (section 3: local and global token anchors, intra-frame optimal transport).
Reference: https://github.com/TyroneLi/AOT @ 88455ee (LLaVA-NeXT/llava/model/llava_arch.py)

Half of the budget are the tokens of most attention in an early block of the tower, as many in each of 3 x 3 windows;
the other half have most attention in the deep block. What a dropped token costs an anchor is 1 - cosine plus half
their distance in an image of side 1; Sinkhorn's rounds turn exp(-cost / 0.1) into a plan that hands an equal share of
a mass of 1 on from every dropped token to every anchor. They end where the scaling of rows changes by less than 0.01,
in the recorded cases after two or three. An anchor becomes the mean of itself and what reached it, and to a tenth the
mean of itself and of the dropped tokens most like it.

Differs: windows that do not come out even are filled by the global scan. Of images of more than some 700 tokens a
dropped token hands its share to the 32 anchors or more that would get most of it: the whole plan grows with the square
of the tokens. The stage that merges frames needs several frames. Each image has its own budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerFacts, TowerSignal
from ivcp_eval.interface.ops import best_of_rest, block_rows, itself, place_in_group, sparse_weights, unit_rows
from ivcp_eval.methods._at_input import AtInput, embeddings, equal_windows, importance, places

WINDOWS = 3  # a side
SPATIAL, EPSILON, ROUNDS, STOP = 0.5, 0.1, 100, 1e-2
ENTRIES, FEWEST = 2**17, 32  # of the plan; of one dropped token


@dataclass(frozen=True)
class Method(AtInput):
    """AOT inside one image.

    Attributes:
        transport: weight of what the plan moves; the rest is the plain mean's.
        depth: of the early block, as a share of the tower's blocks; the first one whose attention spans the image.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    transport: float = 0.9
    depth: float = 5 / 24

    def __post_init__(self) -> None:
        """Refuse shares outside 0..1."""
        if not 0 <= self.transport <= 1 or not 0 <= self.depth < 1:
            raise ValueError(f"transport={self.transport} must lie in 0..1, depth={self.depth} in [0, 1)")

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        """An early block and the deep one."""
        return {"": tower.own, "early": tower.at(self.depth)}

    def choose(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """Anchors, and the weights of what is moved into them."""
        early, deep = importance(signals, image, "early"), importance(signals, image)
        window, half = equal_windows(image, WINDOWS), image.budget // 2
        allowed = place_in_group(early, window) < half // (int(window.max()) + 1)
        taken = allowed.clone()
        taken[best_of_rest(deep, allowed, image.budget - int(allowed.sum()))] = True
        kept, dropped = taken.nonzero().flatten(), (~taken).nonzero().flatten()
        if not dropped.numel():
            return kept, itself(kept, deep.numel())
        return kept, self._weights(unit_rows(embeddings(signals, image)), places(image), kept, dropped)

    def _weights(self, unit: Tensor, place: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        n, m, k = len(unit), dropped.numel(), kept.numel()
        parts = dropped.split(block_rows(n))

        def kernel(part: Tensor) -> tuple[Tensor, Tensor]:
            """(R, K) cosines to the anchors, and exp(-cost / epsilon)."""
            cosine = unit[part] @ unit[kept].T
            apart = torch.cdist(place[part], place[kept], compute_mode="donot_use_mm_for_euclid_dist")
            return cosine, ((cosine - 1 - SPATIAL * apart) / EPSILON).exp()

        row, column = torch.ones(m, device=unit.device), torch.ones(k, device=unit.device)
        for _ in range(ROUNDS):
            before, scaled, arrived = row, [], torch.zeros_like(column)
            for part in parts:
                _, near = kernel(part)
                scaled.append(1 / m / (near @ column))
                arrived += scaled[-1] @ near
            row, column = torch.cat(scaled), 1 / k / arrived
            if float((row - before).abs().mean()) < STOP:
                break
        reach, moved, goal, nearest = min(k, max(FEWEST, ENTRIES // m)), [], [], []
        for part, scale in zip(parts, row.split(block_rows(n)), strict=True):
            cosine, near = kernel(part)
            plan = scale[:, None] * near * column
            best = plan.topk(reach, dim=1)
            moved.append((best.values * plan.sum(dim=1, keepdim=True) / best.values.sum(dim=1, keepdim=True)).flatten())
            goal.append(best.indices.flatten())
            nearest.append(cosine.argmax(dim=1))
        anchor, mass, like = torch.cat(goal), torch.cat(moved), torch.cat(nearest)
        by_plan = self.transport / (1 + torch.zeros_like(column).index_add_(0, anchor, mass))
        by_mean = (1 - self.transport) / (1 + torch.bincount(like, minlength=k))
        return sparse_weights(
            torch.cat((torch.arange(k, device=unit.device), anchor, like)),
            torch.cat((kept, dropped.repeat_interleave(reach), dropped)),
            torch.cat((by_plan + by_mean, mass * by_plan[anchor], by_mean[like])),
            (k, n),
        )
