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
from collections.abc import Mapping, Sequence
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
class _Segment:
    """Frames of a video behind the first stage.

    Attributes:
        kept: of each frame which tokens of the segment stay inside it. inside: the weights of what these become.
        stay: how many of each later frame stay as they are. merged: states of what is kept, where there are later ones.
    """

    kept: list[Tensor]
    inside: list[Tensor]
    stay: list[int]
    merged: list[Tensor]

    def survivors(self, part: Clip, handed: tuple[list[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """(K,) which tokens of the segment stay, in output order, and (K, N) what they become."""
        if handed is None:
            return torch.cat(self.kept), torch.cat(self.inside)
        apart, ends = handed
        rows = [self.kept[0], *(tokens[own] for tokens, own in zip(self.kept[1:], apart, strict=True))]
        free = torch.ones_like(part.tokens, dtype=torch.bool)
        free[torch.cat(rows)] = False
        # Dense only for the tokens that end the segment.
        last = torch.sparse.mm(torch.cat(self.inside).T, ends.T).T.to_sparse()
        stayed = (weights.index_select(0, own) for weights, own in zip(self.inside[1:], apart, strict=True))
        places = torch.cat((*rows, free.nonzero().flatten()[-len(self.kept[0]) :]))
        return places, torch.cat((self.inside[0], *stayed, last))


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
        budgets = apportion(clip.budget, sizes, sizes)
        stages = [self._first_stage(signals, part, budget) for part, budget in zip(parts, budgets, strict=True)]
        ends = self._handed_on(stages)
        kept, weights, start = [], [], 0
        for part, stage, end, size in zip(parts, stages, ends, sizes, strict=True):
            tokens, own = stage.survivors(part, end)
            kept.append(tokens + start)
            weights.append(_beside(own, start, len(clip.tokens)))
            start += size
        return in_output_order(signals, torch.cat(kept), torch.cat(weights))

    def _first_stage(self, signals: Signals, part: Clip, budget: int) -> _Segment:
        """What stays inside each frame of a segment."""
        sizes = part.sizes.tolist()
        anchors, stay = (budget, []) if len(sizes) == 1 else self._counts(sizes, budget)
        kept, inside = [], []
        for frame, first, count in zip(part.frames, part.first.tolist(), [anchors, *stay], strict=False):
            own = min(max(anchors, count), frame.tokens.numel())
            tokens, weights = self.inside(signals, replace(frame, budget=own))
            kept.append(tokens + first)
            inside.append(_beside(weights, first, len(part.tokens)))
        states = embeddings(signals, part) if stay else None
        merged = [] if states is None else [merged_states(weights, states) for weights in inside]
        return _Segment(kept, inside, stay, merged)

    def _handed_on(self, segments: Sequence[_Segment]) -> list[tuple[list[Tensor], Tensor] | None]:
        """`across` of every segment with later frames; those of equal numbers together."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, segment in enumerate(segments):
            if segment.stay:
                alike.setdefault((*map(len, segment.merged), *segment.stay), []).append(number)
        found: list[tuple[list[Tensor], Tensor] | None] = [None] * len(segments)
        for numbers in alike.values():
            frames = zip(*(segments[number].merged for number in numbers), strict=True)
            apart, ends = self.across([torch.stack(states) for states in frames], segments[numbers[0]].stay)
            for place, number in enumerate(numbers):
                found[number] = [own[place] for own in apart], ends[place]
        return found

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

    def across(self, states: Sequence[Tensor], stay: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Hand the later frames of S segments on to their first.

        Args:
            states: of each frame what stayed inside it, (S, M_t, E). stay: how many of each later one stay as they are.

        Returns:
            Of each later frame which stay (S, k), increasing; and (S, M_0, M_0 + M_1 + ...) the weights in all of
            ``states`` of what the first frame's tokens become.
        """
        current = states[0].float()
        count, size, _ = current.shape
        parts = [torch.eye(size, device=current.device).expand(count, -1, -1)]
        apart, number = [], torch.arange(count, device=current.device)[:, None]
        for step, (later, own) in enumerate(zip(states[1:], stay, strict=True), 1):
            plan = _plan(later, current, 1 - exp(-(step**2) / (2 * SPAN**2)))
            apart.append(torch.stack([top(score, own) for score in -plan.amax(dim=2)]))
            plan[number, apart[-1]] = 0
            given = self.handed * plan.transpose(1, 2)
            total = 1 + given.sum(dim=2, keepdim=True)
            current = (current + given @ later.float()) / total
            parts = [part / total for part in (*parts, given)]
        return apart, torch.cat(parts, dim=2)

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
    """(S, N, M) how ``later`` (S, N, E) is handed to ``current`` (S, M, E), rows adding up to 1.

    Time weighs the cost.
    """
    first, second = (unit_rows(states.flatten(0, 1)).view(states.shape) for states in (later, current))
    cost = 1 - (first @ second.transpose(1, 2)).clamp(-CLIPPED, CLIPPED)
    near = (-(cost - cost.amin(dim=(1, 2), keepdim=True)) * weight / EPSILON).exp()
    count, n, m = near.shape
    row, column = near.new_ones(count, n, 1), near.new_ones(count, m, 1)
    moving = near.new_ones(count, 1, 1, dtype=torch.bool)
    for _ in range(ROUNDS):  # each segment's own, which end where it has settled
        before, row = row, torch.where(moving, 1 / n / (near @ column), row)
        column = torch.where(moving, 1 / m / (near.transpose(1, 2) @ row), column)
        moving = moving & ((row - before).abs().mean(dim=1, keepdim=True) >= STOP)
        if not bool(moving.any()):
            break
    plan = row * near * column.transpose(1, 2)
    return plan / plan.sum(dim=2, keepdim=True)


def _beside(weights: Tensor, start: int, n: int) -> Tensor:
    """(K, n) sparse ``weights`` (K, N), whose columns begin at ``start``."""
    sparse = weights.to_sparse().coalesce()
    row, column = sparse.indices()
    return sparse_weights(row, column + start, sparse.values(), (sparse.shape[0], n))
