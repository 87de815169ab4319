"""Merges the patches most like each other in every block of the vision tower, until the budget is met.

Paper: https://arxiv.org/abs/2210.09461 (ToMe, section 3: bipartite soft matching, proportional attention).
Reference: https://github.com/facebookresearch/ToMe @ af95e4b (tome/merge.py, tome/patch/timm.py)

Between attention and MLP of every block, every second patch looks for the one most like it among the others, by the
cosine of the block's keys, mean over heads; the r pairs most alike are merged, weighted by how many patches each stands
for, and attention weighs a merged one by its size. r is the same in every block, but for the last that merge. The class
token is never merged. What was merged becomes one visual token of the language model.

Differs: merged patches go on as equal copies, which changes no number of the others (`engine/signals/merging.py`), but
the tower costs what it costs unpruned: saved is in the language model. r follows from the ratio, where the authors name
it. They classify pictures; that the language model gets each group at the place of its first patch is ours. Where a
visual token is not one patch (merged 2 x 2, tiles cropped and joined) it cannot be; there is `tome_post`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Patches, Selection, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import block_rows, budget, ranking
from ivcp_eval.methods._at_input import AtInput


@dataclass(frozen=True)
class Method(AtInput):
    """ToMe inside the vision tower."""

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"group"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    def merge_patches(self, patches: Patches) -> Tensor:
        """One step of matching."""
        r = merged_by_block(patches.total, budget(patches.ratio, patches.total), patches.tower.own + 1)[patches.block]
        return folded(torch.nn.functional.normalize(patches.key, dim=1), r, patches.tower.class_token)

    def select(self, signals: Signals) -> Selection:
        """The first patch of every group."""
        kept = super().select(signals).keep
        return Selection(kept, exact=kept.numel() == signals.budget)

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """As many as the budget, where the tower could merge so many and the image is a whole picture."""
        group, order = torch.sort(signals.vision["group"][image.tokens], stable=True)
        copy = torch.zeros_like(group, dtype=torch.bool)
        copy[order[1:]] = group[1:] == group[:-1]
        return torch.sort(copy, stable=True).indices[: max(image.budget, copy.numel() - int(copy.sum()))]


@cache
def merged_by_block(n: int, left: int, blocks: int) -> tuple[int, ...]:
    """How many of ``n`` patches each block merges away until ``left`` remain: the same r, as far as there are pairs.

    A block at most halves them, so a tower of very few blocks may leave more.
    """
    amounts: list[int] = []
    for r in range(-(-(n - left) // blocks), n + 1):
        amounts, now = [], n
        for _ in range(blocks):
            amounts.append(min(r, now // 2, now - left))
            now -= amounts[-1]
        if now == left:
            break
    return tuple(amounts)


def folded(unit: Tensor, r: int, class_token: bool = False) -> Tensor:
    """(N,) int64 the place of each token after one step of matching by ``unit`` (N, D), in which ``r`` are merged.

    In the released order: tokens of even place that stay (by descending likeness; in order behind a ``class_token``,
    which is token 0 and stays), then all of odd place.
    """
    even, odd = unit[::2], unit[1::2]
    if not len(odd):
        return torch.arange(len(unit), device=unit.device)
    parts = [(rows @ odd.T).max(dim=1) for rows in even.split(2 * block_rows(len(unit)))]
    likeness, best = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    if class_token:
        likeness[0] = -torch.inf
    numbers = torch.arange(len(unit), device=unit.device)
    count = len(even) - r
    stays = ranking(likeness)[r:]
    place = torch.empty_like(numbers)
    of_even = torch.add(best, count, out=place[::2])
    of_even[stays.sort().values if class_token else stays] = numbers[:count]
    place[1::2] = numbers[count : count + len(odd)]
    return place
