"""Cuts a video into chunks of frames that are alike, and merges in each what is alike in space, then in time.

Paper: https://arxiv.org/abs/2605.12056 (OmniRefine; chunks by dynamic programming, quadtree, merging over time).
Reference: none; the steps as third-party notes on the paper describe them

Chunks of 3 to 5 frames cover the video: those, found by dynamic programming, for which the frames' means differ least
from their chunk's, one minus cosine, with a fixed cost for each chunk. In a chunk every frame is halved along both
sides, and each part again, as long as its tokens are not alike (`quadtree`): below a cosine of 0.82 to their mean. Then
a part joins the same part of the frame before where their means' cosine is at least 0.58. What is joined becomes the
mean of its tokens.

Differs: audio, and all that it decides, is left out. How likeness is taken is not said: ``likeness``. All frames of a
chunk are divided alike, as their least alike one asks, so that parts can be told again in the next frame. The published
thresholds know no budget. Here the quadtree is the published one unless the budget asks for a finer or coarser one,
the last part being divided only as far as is missing; then parts join the frame before, the most alike first, until
the budget is met. Where it is less than one token a chunk, chunks are longer. A mean stands in the middle of its
frames, at the token nearest to the middle of its part. A picture is a video of one frame, hence `quadtree`. Frames of
unequal size are one row of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.interface.ops import group_means, place_in_group, top, unit_rows
from ivcp_eval.methods._at_input import embeddings, grid_of
from ivcp_eval.methods._clips import Clip, CountedClips
from ivcp_eval.methods.quadtree import block_likeness, nested_blocks


@dataclass(frozen=True)
class Tree:
    """How the frames of every chunk are divided, step by step; frames have S tokens.

    Attributes:
        blocks: of every level (S,) which block, in reading order, a token is in.
        chunk, level, block: (D,) of each division, in the order in which they are made.
        adds: (D,) parts that it adds to a frame. bound: (D,) thresholds above this ask for it.
    """

    blocks: list[Tensor]
    chunk: Tensor
    level: Tensor
    block: Tensor
    adds: Tensor
    bound: Tensor


@dataclass(frozen=True)
class Method(CountedClips):
    """OmniRefine without audio.

    Attributes:
        counts: "ratio" (exact budgets), or "released": the thresholds decide, whatever the ratio.
        spatial: cosine below which a part is divided. temporal: from which on it joins the frame before.
        shortest, longest: frames of a chunk. cost: of each chunk.
        likeness: of a part: the "least" cosine of its tokens to their mean, or the "mean" of these.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    spatial: float = 0.82
    temporal: float = 0.58
    shortest: int = 3
    longest: int = 5
    cost: float = 0.02
    likeness: Literal["least", "mean"] = "least"

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if self.likeness not in ("least", "mean"):
            raise ValueError(f"likeness={self.likeness!r} must be 'least' or 'mean'")
        if not (-1 <= self.spatial <= 1 and -1 <= self.temporal <= 1):
            raise ValueError(f"spatial={self.spatial} and temporal={self.temporal} must be cosines, in -1..1")
        if self.shortest < 1 or self.longest < 2 * self.shortest - 1 or self.cost < 0:
            raise ValueError(
                f"shortest={self.shortest} must be 1 or more, cost={self.cost} 0 or more, longest={self.longest} at "
                "least twice the shortest less 1, so that chunks cover any video"
            )

    def choose(self, signals: Signals, clip: Clip) -> tuple[Tensor, Tensor]:
        """The middles of what is joined, and the means."""
        unit, rows, columns = unit_rows(embeddings(signals, clip)), 1, len(clip.tokens)
        if bool((clip.sizes == clip.sizes[0]).all()):
            rows, columns = grid_of(clip.frames[0])
        states = unit.view(-1, rows * columns, unit.shape[1])
        part = self.parts(states, rows, columns, clip.budget)
        return middles(part, rows, columns), group_means(part.flatten(), int(part.max()) + 1)

    def parts(self, unit: Tensor, rows: int, columns: int, budget: int) -> Tensor:
        """(T, S) which mean each token of the frames ``unit`` (T, S, E), unit vectors on a grid, becomes part of."""
        n_frames = len(unit)
        shortest = max(self.shortest, -(-n_frames // budget)) if self.exact else self.shortest
        lengths = chunk_lengths(unit.mean(dim=1), shortest, max(self.longest, 2 * shortest - 1), self.cost)
        chunk = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(unit.device)
        tree = quadtree(unit, chunk, rows, columns, self.likeness)
        spatial = spatial_parts(tree, len(lengths), self.steps(tree, lengths, budget))[chunk]
        part = (spatial + torch.arange(n_frames, device=unit.device)[:, None] * (int(spatial.max()) + 1)).flatten()
        part = part.unique(return_inverse=True)[1].view_as(spatial)
        before = earlier_parts(part, chunk)
        means = unit_rows(
            torch.zeros(len(before), unit.shape[2], device=unit.device).index_add_(
                0, part.flatten(), unit.flatten(0, 1)
            )
        )
        links = (before >= 0).nonzero().flatten()
        alike = torch.cat([(means[some] * means[before[some]]).sum(dim=1) for some in links.split(2048)])
        joined = links[top(alike, len(before) - budget) if self.exact else alike >= self.temporal]
        return runs(before, joined)[part]

    def steps(self, tree: Tree, lengths: Sequence[int], budget: int) -> int:
        """How many parts the frames of chunks of these ``lengths`` are divided into beyond one each, added up."""
        published = int(tree.adds[tree.bound < self.spatial].sum())
        if not self.exact:
            return published
        # One more part of a chunk adds one that cannot join another, and as many in all as the chunk has frames.
        frames = torch.tensor(lengths, device=tree.chunk.device)[tree.chunk].repeat_interleave(tree.adds)
        enough = int((sum(lengths) + frames.cumsum(0) < budget).sum()) + int(sum(lengths) < budget)
        return min(max(published, enough), budget - len(lengths))


def chunk_lengths(means: Tensor, shortest: int, longest: int, cost: float) -> list[int]:
    """Frames of each chunk, at least ``shortest`` unless the video is shorter, at most ``longest``.

    The least sum, over chunks, of ``cost`` and one minus cosine of each frame's mean (T, E) to the chunk's.
    """
    n = len(means)
    if n <= shortest:
        return [n]
    unit = unit_rows(means).double().cpu()
    total = torch.cat((torch.zeros_like(unit[:1]), unit.cumsum(dim=0)))
    least, length = [0.0] + [float("inf")] * n, [0] * (n + 1)
    for stop in range(shortest, n + 1):
        sizes = range(shortest, min(longest, stop) + 1)
        # Of unit vectors, the cosines to their sum add up to its length.
        together = (total[stop] - total[stop - sizes[-1] : stop - shortest + 1].flip(0)).norm(dim=1).tolist()
        for size, norm in zip(sizes, together, strict=True):
            this = least[stop - size] + cost + size - norm
            if this < least[stop]:
                least[stop], length[stop] = this, size
    found, stop = [], n
    while stop:
        found.append(length[stop])
        stop -= length[stop]
    return found[::-1]


def quadtree(unit: Tensor, chunk: Tensor, rows: int, columns: int, likeness: str) -> Tree:
    """The divisions of every chunk's frames; ``unit``: (T, S, E), ``chunk``: (T,) of each frame."""
    n_frames = len(unit)
    n_chunks = int(chunk[-1]) + 1
    blocks = nested_blocks(rows, columns, unit.device)
    bound = torch.full((n_chunks, 1), -torch.inf, device=unit.device)
    bounds, adds, where = [], [], []
    for level, (block, below) in enumerate(pairwise(blocks)):
        n_blocks = int(block.max()) + 1
        every = block + torch.arange(n_frames, device=unit.device)[:, None] * n_blocks
        alike = block_likeness(unit.flatten(0, 1), every.flatten(), likeness).view(n_frames, n_blocks)
        least = torch.full_like(bound, torch.inf).scatter_reduce_(0, chunk[:, None].expand_as(alike), alike, "amin")
        bound = torch.maximum(bound, least)
        parent = torch.empty(int(below.max()) + 1, dtype=torch.long, device=unit.device)
        parent[below] = block
        bounds.append(bound.flatten())
        adds.append((torch.bincount(parent) - 1).repeat(n_chunks))
        place = torch.arange(n_chunks * n_blocks, device=unit.device)
        where.append(torch.stack((place // n_blocks, torch.full_like(place, level), place % n_blocks)))
        bound = bound[:, parent]
    if not bounds:
        none = torch.zeros(0, dtype=torch.long, device=unit.device)
        return Tree(blocks, none, none, none, none, none.float())
    thresholds, order = torch.cat(bounds).sort(stable=True)
    of_chunk, of_level, of_block = torch.cat(where, dim=1)[:, order]
    return Tree(blocks, of_chunk, of_level, of_block, torch.cat(adds)[order], thresholds)


def spatial_parts(tree: Tree, n_chunks: int, steps: int) -> Tensor:
    """(C, S) which part of a frame each token is of, by numbers of its chunk, with ``steps`` parts beyond one a chunk.

    Of the last division a few quarters, in reading order, become parts of their own and the others stay one.
    """
    made = tree.adds.cumsum(dim=0)
    count = int((made <= steps).sum())
    size = len(tree.blocks[0])
    depth = torch.zeros(n_chunks, size, dtype=torch.long, device=tree.adds.device)
    reached = torch.ones_like(depth, dtype=torch.bool)
    for level, block in enumerate(tree.blocks[:-1]):
        here = (tree.level[:count] == level).nonzero().flatten()
        divided = torch.zeros(n_chunks, size, dtype=torch.bool, device=depth.device)  # never more blocks than tokens
        divided[tree.chunk[here], tree.block[here]] = True
        reached = reached & divided[:, block]
        depth += reached
    missing = steps - (int(made[count - 1]) if count else 0)
    if missing:
        level = int(tree.level[count])
        quarters = tree.blocks[level + 1][tree.blocks[level] == tree.block[count]].unique()[:missing]
        depth[tree.chunk[count]] += torch.isin(tree.blocks[level + 1], quarters)
    return torch.stack(tree.blocks)[depth, torch.arange(size, device=depth.device)] + depth * size


def earlier_parts(part: Tensor, chunk: Tensor) -> Tensor:
    """(P,) the same part of the frame before, -1 in the first frame of a chunk; ``part``: (T, S), ``chunk``: (T,)."""
    before = part.new_full((int(part.max()) + 1,), -1)
    goes_on = chunk[1:] == chunk[:-1]
    before[part[1:][goes_on]] = part[:-1][goes_on]
    return before


def runs(before: Tensor, joined: Tensor) -> Tensor:
    """(P,) the number, in order, of the run of parts that each is of, where the ``joined`` belong to the one before."""
    first = torch.arange(len(before), device=before.device)
    first[joined] = before[joined]
    while not torch.equal(first, first[first]):
        first = first[first]
    return first.unique(return_inverse=True)[1]


def middles(part: Tensor, rows: int, columns: int) -> Tensor:
    """(K,) the token at which each mean stands; ``part``: (T, S), of whose frames each is a grid."""
    flat, n_frames = part.flatten(), len(part)
    token = torch.arange(rows * columns, device=part.device)
    place = torch.stack((token // columns, token % columns), dim=1).float().repeat(n_frames, 1)
    frame = torch.arange(n_frames, device=part.device).repeat_interleave(rows * columns)
    size = torch.bincount(flat)
    ends = [
        frame.new_full(size.shape, start).scatter_reduce_(0, flat, frame, how)
        for start, how in ((n_frames, "amin"), (0, "amax"))
    ]
    middle = torch.zeros(len(size), 2, device=part.device).index_add_(0, flat, place) / size[:, None]
    off_centre = (place - middle[flat]).square().sum(dim=1)
    other_frames = frame != ((ends[0] + ends[1]) // 2)[flat]
    first = place_in_group(-off_centre - other_frames * float(rows + columns) ** 2, flat) == 0
    kept = torch.empty_like(size)
    kept[flat[first]] = first.nonzero().flatten()
    return kept
