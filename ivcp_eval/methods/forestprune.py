"""Keeps the roots of trees of tokens that are alike and near, over the half of each frame that gathers information.

Paper: https://arxiv.org/abs/2603.22911 (ForestPrune: spatial-temporal forests; pruning by depth).
Reference: https://github.com/luminousllsa/ForestPrune @ 1686829 (llava/model/llava_arch_forest.py,
``prune_temporal_forest_spatial``)

G-Prune (`gprune`) keeps half of a frame. In the first frame of a video every token left is a tree. A token of a later
frame grows the tree that holds the one most like it (cosine of 0.9 and more) of those near it (at most 0.2 of the frame
apart, along either axis), behind that tree's last one before the frame; where there is none it is a new tree. If there
are more trees than the budget, the two most alike roots are joined, the later below the earlier, until there are as
many. What stays has the least depth, and of equal depth the earliest frame.

Differs: the budget is the ratio's of all tokens of the video; the released code takes twice the ratio of the halves,
which rounds otherwise where a half is no whole number. Above a ratio of 0.5, for which nothing is released, G-Prune
keeps as many as the budget. Of equally deep tokens of one frame the first stay. A picture is a video of one frame, with
trees of one token each.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.interface.ops import block_rows, top, unit_rows
from ivcp_eval.methods import gprune
from ivcp_eval.methods._at_input import embeddings, places
from ivcp_eval.methods._clips import Clip, ClipsAtInput

HALF = 0.5  # of a frame, what G-Prune keeps
NEIGHBOURS = 64  # of a root that are known at a time


@dataclass(frozen=True)
class Method(ClipsAtInput):
    """ForestPrune.

    Attributes:
        alike: cosine from which on a token may grow a tree.
        near: 1 minus the distance along either axis, in a frame of side 1, up to which it may.
    """

    faithfulness: ClassVar[Faithfulness] = "faithful"

    alike: float = 0.9
    near: float = 0.8

    def __post_init__(self) -> None:
        """Refuse shares that no run can mean."""
        if not 0 < self.alike <= 1 or not 0 <= self.near <= 1:
            raise ValueError(f"alike={self.alike} must lie in (0, 1], near={self.near} in 0..1")

    def choose(self, signals: Signals, clip: Clip) -> Tensor:
        """The least deep tokens of the forest."""
        halves = self.halves(signals, clip)
        pairs = list(zip(clip.frames, halves, strict=True))
        states = [embeddings(signals, frame)[half] for frame, half in pairs]
        forest = self.forest(states, [places(frame)[half] for frame, half in pairs], clip.budget)
        first = clip.first.tolist()
        return torch.cat([half + start for half, start in zip(halves, first, strict=True)])[forest.chosen]

    def halves(self, signals: Signals, clip: Clip) -> list[Tensor]:
        """Per frame what G-Prune keeps, increasing: half, or as many as the budget."""
        scores = [gprune.Method().scores(embeddings(signals, frame)) for frame in clip.frames]
        sizes = [max(round(HALF * frame.n_prompt), frame.budget) for frame in clip.frames]
        return [top(score, size) for score, size in zip(scores, sizes, strict=True)]

    def forest(self, states: list[Tensor], where: list[Tensor], k: int) -> Forest:
        """Of the frames' ``states`` (N_t, E) at ``where`` (N_t, 2), one frame after the other."""
        unit, sizes = unit_rows(torch.cat(states)), [len(frame) for frame in states]
        place = torch.cat(where)
        tree, parent, tails = list(range(sizes[0])), [-1] * sizes[0], list(range(sizes[0]))
        first = sizes[0]
        for size in sizes[1:]:
            found = self._grown(unit, place, first, size)
            before = list(tails)
            for token, like in enumerate(found, first):
                tree.append(tree[like] if like >= 0 else len(tails))
                parent.append(before[tree[like]] if like >= 0 else -1)
                if like < 0:
                    tails.append(token)
                tails[tree[token]] = token
            first += size
        roots = [token for token, above in enumerate(parent) if above < 0]
        for upper, lower in most_alike(unit[roots], len(roots) - k):
            parent[roots[lower]] = roots[upper]
        depth = [0] * len(parent)
        for token, above in enumerate(parent):  # which comes before it
            depth[token] = depth[above] + 1 if above >= 0 else 0
        # Frames follow one another, so of equal depth the earliest come first.
        order = np.argsort(depth, kind="stable")
        return Forest(torch.from_numpy(np.sort(order[:k])).to(unit.device), parent, depth)

    def _grown(self, unit: Tensor, place: Tensor, first: int, size: int) -> list[int]:
        """Of each token of a frame the earlier one that it follows; -1 for none."""
        now = slice(first, first + size)
        cosine = unit[now] @ unit[:first].T
        apart = (place[now][:, None] - place[None, :first]).abs().amax(dim=2)
        cosine = cosine.masked_fill((cosine < self.alike) | (1 - apart < self.near), -torch.inf)
        best = cosine.max(dim=1)
        return torch.where(best.values > -torch.inf, best.indices, -1).tolist()


@dataclass(frozen=True)
class Forest:
    """The tokens that stay, increasing; and of every token the one above it, -1 for roots, and its depth."""

    chosen: Tensor
    parent: list[int]
    depth: list[int]


def most_alike(unit: Tensor, times: int) -> list[tuple[int, int]]:
    """``times`` pairs (earlier, later) of ``unit`` (N, D), each the most alike of those left; then the later leaves.

    Each token knows its nearest earlier ones, some at a time; they are looked for anew once all of them have left.
    """
    left = np.ones(len(unit), dtype=bool)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < times:
        names = left.nonzero()[0]
        cosines, nearest = _earlier(unit[torch.from_numpy(names).to(unit.device)])
        nearest = names[nearest]
        heap = [(-float(cosines[row, 0]), int(nearest[row, 0]), int(token), row, 0) for row, token in enumerate(names)]
        heap = heap[1:]  # nothing is earlier than the first
        heapq.heapify(heap)
        while len(pairs) < times:
            _, upper, lower, row, rank = heapq.heappop(heap)
            if left[upper]:
                left[lower] = False
                pairs.append((upper, lower))
                continue
            rank += 1
            if rank == row:  # all earlier ones have left
                continue
            if rank == nearest.shape[1]:
                break
            heapq.heappush(heap, (-float(cosines[row, rank]), int(nearest[row, rank]), lower, row, rank))
    return pairs


def _earlier(unit: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(N, m) the largest cosines of each row to earlier ones, and to which, descending; row i has i of them."""
    n, m = len(unit), min(NEIGHBOURS, len(unit))
    column, values, indices = torch.arange(n, device=unit.device), [], []
    for rows in column.split(block_rows(n)):
        cosine = (unit[rows] @ unit.T).masked_fill(column >= rows[:, None], -torch.inf)
        found = cosine.topk(m, dim=1)
        values.append(found.values)
        indices.append(found.indices)
    return torch.cat(values).cpu().numpy(), torch.cat(indices).cpu().numpy()
