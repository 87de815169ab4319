"""Merges square blocks of visual tokens that are alike, large ones where the image is even, and keeps each mean.

Paper: https://arxiv.org/abs/2605.12056 (OmniRefine; the spatial merging of its video tokens).
Reference: none; the merging as third-party notes on the paper describe it

The image is halved along both sides, and each part again, as long as its tokens are not alike: their least cosine to
their mean, all tokens of length 1, is below a threshold. Every part becomes the mean of its tokens. The threshold is
the one that leaves as many parts as the budget says.

Differs: of OmniRefine this is one part, that of a single image, so it is a variant. How a block's likeness is taken is
not said: ``likeness``. The last part to be divided is divided only so far that the budget is met exactly: some quarters
in reading order become parts of their own, the others stay one; ``threshold`` is the published rule, which knows no
budget. Sides that are no power of two are halved as evenly as may be; an image that is no grid (tiles, newlines) is one
row. A mean stands at the token nearest to the middle of its part. Videos: `omnirefine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signals
from ivcp_eval.interface.ops import group_means, place_in_group, unit_rows
from ivcp_eval.methods._at_input import AtInput, embeddings, grid_of


@dataclass(frozen=True)
class Method(AtInput):
    """OmniRefine's quadtree on one image.

    Attributes:
        likeness: of a block: the "least" cosine of its tokens to their mean, so that a small thing is not lost in what
            surrounds it, or the "mean" of these cosines.
        threshold: a fixed one, 0.82 in the paper, instead of the budget's; None follows the budget.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    likeness: Literal["least", "mean"] = "least"
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if self.likeness not in ("least", "mean"):
            raise ValueError(f"likeness={self.likeness!r} must be 'least' or 'mean'")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is no cosine; it must lie in -1..1")

    @property
    def exact(self) -> bool:
        """Unless a threshold decides."""
        return self.threshold is None

    def choose(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """The middles of the parts, and the means."""
        rows, columns = grid_of(image)
        part = self.parts(unit_rows(embeddings(signals, image)), rows, columns, image.budget)
        token = torch.arange(part.numel(), device=part.device)
        place = torch.stack((token // columns, token % columns), dim=1).float()
        size = torch.bincount(part)
        middle = torch.zeros(size.numel(), 2, device=part.device).index_add_(0, part, place) / size[:, None]
        off_centre = (place - middle[part]).square().sum(dim=1)
        first = (place_in_group(-off_centre, part) == 0).nonzero().flatten()
        kept = torch.empty_like(first)
        kept[part[first]] = first
        return kept, group_means(part, size.numel())

    def parts(self, unit: Tensor, rows: int, columns: int, budget: int) -> Tensor:
        """(N,) which part each token of ``unit`` (N, E), a grid, belongs to; ``budget`` parts, or by the threshold."""
        blocks = nested_blocks(rows, columns, unit.device)
        bounds, gains = [], []  # of the blocks of every level but the last
        bound = torch.full((1,), -torch.inf, device=unit.device)
        for block, below in pairwise(blocks):
            bound = torch.maximum(bound, block_likeness(unit, block, self.likeness))
            parent = torch.empty(int(below.max()) + 1, dtype=torch.long, device=unit.device)
            parent[below] = block
            bounds.append(bound)  # thresholds above this divide the block, and all that it is part of
            gains.append(torch.bincount(parent) - 1)
            bound = bound[parent]
        if not bounds:
            return blocks[0]
        every, sizes = torch.cat(bounds), [len(level) for level in bounds]
        order = every.sort(stable=True).indices
        grown = torch.cat(gains)[order].cumsum(0)
        count = int((grown < budget).sum() if self.threshold is None else (every < self.threshold).sum())
        divided = torch.zeros_like(every, dtype=torch.bool)
        divided[order[:count]] = True
        depth, reached = torch.zeros_like(blocks[0]), torch.ones_like(blocks[0], dtype=torch.bool)
        for block, mask in zip(blocks, divided.split(sizes), strict=False):
            reached = reached & mask[block]
            depth += reached
        if self.threshold is None and count < order.numel():
            whole, level = int(order[count]), 0
            while whole >= sizes[level]:
                whole, level = whole - sizes[level], level + 1
            quarters = blocks[level + 1][blocks[level] == whole].unique()
            missing = budget - 1 - (int(grown[count - 1]) if count else 0)
            depth += torch.isin(blocks[level + 1], quarters[:missing])
        tokens = torch.arange(len(unit), device=unit.device)
        return (torch.stack(blocks)[depth, tokens] + depth * len(unit)).unique(return_inverse=True)[1]


def nested_blocks(rows: int, columns: int, device: torch.device) -> list[Tensor]:
    """Per level (N,) which block, in reading order, a token of a grid is in: the image, its quarters, ..., tokens."""
    token, found = torch.arange(rows * columns, device=device), []
    for level in range((max(rows, columns) - 1).bit_length() + 1):
        # Line i of n is in the last of 2^level stretches that begin at or before it: stretch j at j n / 2^level.
        row = (((token // columns + 1) << level) - 1) // rows
        column = (((token % columns + 1) << level) - 1) // columns
        found.append(((row << level) + column).unique(return_inverse=True)[1])
    return found


def block_likeness(unit: Tensor, block: Tensor, kind: str) -> Tensor:
    """(B,) least or mean cosine of a block's tokens to their mean; infinite for single tokens."""
    size = torch.bincount(block)
    total = torch.zeros(size.numel(), unit.shape[1], device=unit.device).index_add_(0, block, unit)
    if kind == "mean":  # of inner products with the mean, over its length: the length itself
        found = total.norm(dim=1) / size
    else:
        cosine = (unit * unit_rows(total)[block]).sum(dim=1)
        found = torch.full_like(total[:, 0], torch.inf).scatter_reduce_(0, block, cosine, "amin")
    return found.masked_fill(size == 1, torch.inf)
