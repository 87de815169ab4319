"""Keeps anchors that the vision tower attends to, near and far, and moves the others into them by optimal transport.

Paper: https://arxiv.org/abs/2603.01400 (section 3: local and global token anchors, intra- and inter-frame transport).
Reference: https://github.com/TyroneLi/AOT @ 88455ee (LLaVA-NeXT/llava/model/llava_arch.py)

Inside a frame, half of the tokens that stay are those of most attention in an early block of the tower, as many in each
of 3 x 3 windows; the other half have most attention in the deep block. What a dropped token costs an anchor is
1 - cosine plus half their distance in a frame of side 1; Sinkhorn's rounds turn exp(-cost / 0.1) into a plan that hands
an equal share of a mass of 1 on from every dropped token to every anchor. They end where the scaling of rows changes by
less than 0.01, in the recorded cases after two or three. An anchor becomes the mean of itself and what reached it, and
to a tenth the mean of itself and of the dropped tokens most like it.

A video is then cut into segments. What stayed of a segment's first frame is handed what stayed of the later ones, frame
by frame, at a cost of 1 - cosine (moved to 0 at its least) times 1 - exp(-dt^2 / (2 * 1.5^2)). The ``apart`` tokens of
a later frame whose plan is the least concentrated stay as they are, and are not handed on. A segment ends in the first
frame's tokens as handed on; they also stand at its head as they were.

Differs: windows that do not come out even are filled by the global scan. Of frames of more than some 700 tokens a
dropped token hands its share to the 32 anchors or more that would get most of it: the whole plan grows with the square
of the tokens. The released code cuts 32 frames into segments of 4 and 64 into segments of 8, and fails on any other
number; here an eighth of the frames, and 4 at least, are a segment. It has the first stage keep a fixed number and
lets the second one follow; here the first keeps the most with which both hold the budget of a segment, and what is left
of that lets more of the later frames stay. The first stage works on the language model's input, the released one before
pooling. The tokens that end a segment take places of dropped ones, the segment's last. A picture has the first stage
alone.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, exp
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerFacts, TowerSignal
from ivcp_eval.interface.ops import (
    apportion,
    best_of_rest,
    block_rows,
    itself,
    merged_states,
    place_in_group,
    sparse_weights,
    top,
    unit_rows,
)
from ivcp_eval.methods._at_input import Chosen, embeddings, equal_windows, importance, in_output_order, places
from ivcp_eval.methods._clips import Clip, ClipsAtInput

WINDOWS = 3  # a side
SPATIAL, EPSILON, ROUNDS, STOP = 0.5, 0.1, 100, 1e-2
ENTRIES, FEWEST = 2**17, 32  # of the plan; of one dropped token
SEGMENTS, SHORTEST = 8, 4  # of a video; frames
SPAN = 1.5  # frames, of the weight of time
CLIPPED = 1 - 1e-6  # cosines


@dataclass(frozen=True)
class Method(ClipsAtInput):
    """AOT.

    Attributes:
        transport: weight of what the plan moves inside a frame; the rest is the plain mean's.
        depth: of the early block, as a share of the tower's blocks; the first one whose attention spans the image.
        apart: share of a later frame's tokens that stay as they are.
        handed: weight of what the first frame of a segment is handed by each later one.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    transport: float = 0.9
    depth: float = 5 / 24
    apart: float = 0.3
    handed: float = 1.0

    def __post_init__(self) -> None:
        """Refuse shares outside 0..1."""
        if not 0 <= self.transport <= 1 or not 0 <= self.depth < 1 or not 0 <= self.apart <= 1 or self.handed < 0:
            raise ValueError(
                f"transport={self.transport} and apart={self.apart} must lie in 0..1, depth={self.depth} in [0, 1), "
                f"handed={self.handed} be 0 or more"
            )

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        """An early block and the deep one."""
        return {"": tower.own, "early": tower.at(self.depth)}

    def choose(self, signals: Signals, clip: Clip) -> Chosen:
        """Segment by segment."""
        count = len(clip.frames)
        length = max(SHORTEST, -(-count // SEGMENTS))
        parts = [Clip(clip.frames[first : first + length]) for first in range(0, count, length)]
        sizes = [len(part.tokens) for part in parts]
        kept, weights, start = [], [], 0
        for part, size, budget in zip(parts, sizes, apportion(clip.budget, sizes, sizes), strict=True):
            tokens, own = self._segment(signals, part, budget)
            kept.append(tokens + start)
            weights.append(_beside(own, start, len(clip.tokens)))
            start += size
        return in_output_order(signals, torch.cat(kept), torch.cat(weights))

    def _segment(self, signals: Signals, part: Clip, budget: int) -> tuple[Tensor, Tensor]:
        """(K,) which tokens of a segment stay, in output order, and (K, N) what they become."""
        sizes = part.sizes.tolist()
        anchors, stay = (budget, []) if len(sizes) == 1 else self._counts(sizes, budget)
        kept, inside = [], []
        for frame, first, count in zip(part.frames, part.first.tolist(), [anchors, *stay], strict=False):
            own = min(max(anchors, count), frame.tokens.numel())
            tokens, weights = self.inside(signals, replace(frame, budget=own))
            kept.append(tokens + first)
            inside.append(_beside(weights, first, len(part.tokens)))
        if not stay:
            return torch.cat(kept), torch.cat(inside)
        states = embeddings(signals, part)
        apart, ends = self.across([merged_states(weights, states) for weights in inside], stay)
        rows = [kept[0], *(tokens[own] for tokens, own in zip(kept[1:], apart, strict=True))]
        free = torch.ones_like(part.tokens, dtype=torch.bool)
        free[torch.cat(rows)] = False
        # Dense only for the tokens that end the segment.
        last = torch.sparse.mm(torch.cat(inside).T, ends.T).T.to_sparse()
        survivors = [inside[0], *(w.index_select(0, own) for w, own in zip(inside[1:], apart, strict=True)), last]
        return torch.cat((*rows, free.nonzero().flatten()[-anchors:])), torch.cat(survivors)

    def _counts(self, sizes: list[int], budget: int) -> tuple[int, list[int]]:
        """How many tokens of a segment's first frame stay, and of each later one; the first's stand there twice.

        With a budget of one token there is no segment to end.
        """
        if budget < 2:
            return budget, []
        later = sizes[1:]
        first = bisect_right(range(1, sizes[0] + 1), budget, key=lambda m: 2 * m + len(later) * self._stay(m))
        first = max(first, ceil((budget - sum(later)) / 2))  # more than the later frames have cannot stay of them
        return first, apportion(budget - 2 * first, later, later)

    def _stay(self, count: int) -> int:
        """How many of a later frame's tokens stay as they are: those below a quantile."""
        return ceil(self.apart * (count - 1) - 1e-9)

    def across(self, states: list[Tensor], stay: list[int]) -> tuple[list[Tensor], Tensor]:
        """Hand a segment's later frames on to its first.

        Args:
            states: of each frame what stayed inside it, (M_t, E). stay: how many of each later frame stay as they are.

        Returns:
            Of each later frame which stay, increasing; and (M_0, M_0 + M_1 + ...) the weights in all of ``states`` of
            what the first frame's tokens become.
        """
        current, parts = states[0].float(), [torch.eye(len(states[0]), device=states[0].device)]
        apart = []
        for step, (later, count) in enumerate(zip(states[1:], stay, strict=True), 1):
            plan = _plan(later, current, 1 - exp(-(step**2) / (2 * SPAN**2)))
            apart.append(top(-plan.amax(dim=1), count))
            plan[apart[-1]] = 0
            given = self.handed * plan.T
            total = 1 + given.sum(dim=1, keepdim=True)
            current = (current + given @ later.float()) / total
            parts = [part / total for part in (*parts, given)]
        return apart, torch.cat(parts, dim=1)

    def inside(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """Of one frame with its budget: anchors, and the weights of what is moved into them."""
        early, deep = importance(signals, image, "early"), importance(signals, image)
        window, half = equal_windows(image, WINDOWS), image.budget // 2
        allowed = place_in_group(early, window) < half // (int(window.max()) + 1)
        taken = allowed.clone()
        taken[best_of_rest(deep, allowed, image.budget - int(allowed.sum()))] = True
        kept, dropped = taken.nonzero().flatten(), (~taken).nonzero().flatten()
        if not dropped.numel() or not kept.numel():
            return kept, itself(kept, deep.numel())
        return kept, self._weights(unit_rows(embeddings(signals, image)), places(image), kept, dropped)

    def _weights(self, unit: Tensor, place: Tensor, kept: Tensor, dropped: Tensor) -> Tensor:
        n, m, k = len(unit), dropped.numel(), kept.numel()
        parts = dropped.split(block_rows(n))

        def made(part: int) -> tuple[Tensor, Tensor]:
            """(R, K) cosines to the anchors, and exp(-cost / epsilon)."""
            cosine = unit[parts[part]] @ unit[kept].T
            apart = torch.cdist(place[parts[part]], place[kept], compute_mode="donot_use_mm_for_euclid_dist")
            return cosine, ((cosine - 1 - SPATIAL * apart) / EPSILON).exp()

        kernel = functools.cache(made) if len(parts) == 1 else made  # several are too large to keep

        row, column = torch.ones(m, device=unit.device), torch.ones(k, device=unit.device)
        for _ in range(ROUNDS):
            before, scaled, arrived = row, list[Tensor](), list[Tensor]()
            for part in range(len(parts)):
                _, near = kernel(part)
                scaled.append(1 / m / (near @ column))
                arrived.append(scaled[-1] @ near)
            row, column = _joined(scaled), 1 / k / functools.reduce(torch.add, arrived)
            if float((row - before).abs().mean()) < STOP:
                break
        reach, moved, goal, nearest = min(k, max(FEWEST, ENTRIES // m)), [], [], []
        for part, scale in enumerate(row.split(block_rows(n))):
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


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _plan(later: Tensor, current: Tensor, weight: float) -> Tensor:
    """(N, M) how ``later`` (N, E) is handed to ``current`` (M, E), rows adding up to 1. Time weighs the cost."""
    cost = 1 - (unit_rows(later) @ unit_rows(current).T).clamp(-CLIPPED, CLIPPED)
    near = (-(cost - cost.min()) * weight / EPSILON).exp()
    n, m = near.shape
    row, column = near.new_ones(n), near.new_ones(m)
    for _ in range(ROUNDS):
        before, row = row, 1 / n / (near @ column)
        column = 1 / m / (row @ near)
        if float((row - before).abs().mean()) < STOP:
            break
    plan = row[:, None] * near * column
    return plan / plan.sum(dim=1, keepdim=True)


def _beside(weights: Tensor, start: int, n: int) -> Tensor:
    """(K, n) sparse ``weights`` (K, N), whose columns begin at ``start``."""
    sparse = weights.to_sparse().coalesce()
    row, column = sparse.indices()
    return sparse_weights(row, column + start, sparse.values(), (sparse.shape[0], n))
