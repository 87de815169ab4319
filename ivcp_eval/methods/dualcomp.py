"""Keeps clusters of alike visual tokens that are attended to, and paths along the edges of what is shown.

Paper: https://arxiv.org/abs/2604.11122 (semantic clusters and geometric paths, split by a router).
Reference: https://github.com/Cynthia314/DualComp @ 44641d2 (its parts; the router and all that the
paper leaves open are left to the caller)

Semantic half: a token joins the one most like it (cosine) of those before it that touch it; clusters of the largest sum
of attention survive, small ones as their most attended token, others as the mean of theirs, weighted by attention.
Geometric half: edge = |F - mean of F over 3 x 3|^2; structure = edge (1 + beta relevance), both moved to 0..1 inside
the image. In each of equal regions the largest edge is an anchor; from one anchor to the next leads a path that steps
to the neighbour of most structure among those nearer (rows or columns, whichever are more) to the next anchor.

Differs: the weights of the router, which sets lambda and the number of tokens, are not public. `ivcp lab train
dualcomp` makes such for a model: ``weights``; without a file lambda is fixed, and the number is the budget unless
``counts`` asks for the router's. Both are variants. Threshold, sizes, regions and beta are not public: each is a field.
The threshold of likeness is the one that leaves a given number of clusters, since a fixed cosine would mean something
else in every model. As many regions are taken as make the paths as long as the geometric budget; of a longer path the
tokens of most structure stay, a shorter one is filled up with the most structure elsewhere. Relevance is the cosine to
the question's mean embedding. The halves are not scaled by 1 - lambda and lambda (``scaled``), which the language model
would have to be trained with. A token stands for one half only. An image that is no grid (tiles, newlines) is one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import (
    best_of_rest,
    partition,
    place_in_group,
    ranking,
    sparse_weights,
    unit_range,
    unit_rows,
)
from ivcp_eval.methods._at_input import AtInput, embeddings, grid_of, importance, relevance
from ivcp_eval.methods._trained import Router, answer_of

NEIGHBOURS = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1) if (down, across) != (0, 0)]


@dataclass(frozen=True)
class Method(AtInput):
    """DualComp, with a router that was trained here or with a fixed split.

    Attributes:
        weights: file of a router (`ivcp lab train dualcomp`).
        counts: "ratio" (the user's budget, exactly) or "router", which says of each picture how much of it stays.
        geometric: lambda, the share of the budget for paths, without a router; half, since its mean is not known.
        clusters: how many are formed for each that survives: of two, attention leaves one.
        large: from how many tokens on a cluster is a mean.
        relevant: beta, the weight of relevance beside edges.
        regions: how many anchors; None makes the paths about as long as their budget.
        scaled: whether the halves are multiplied by 1 - lambda and lambda, as behind the trained router.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    weights: Path | None = None
    counts: Literal["ratio", "router"] = "ratio"
    geometric: float = 0.5
    clusters: float = 2.0
    large: int = 4
    relevant: float = 1.0
    regions: int | None = None
    scaled: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if self.counts not in ("ratio", "router") or (self.counts == "router" and self.weights is None):
            raise ValueError(f"counts={self.counts!r} must be 'ratio', or 'router' where weights=FILE is given")
        if not 0 <= self.geometric <= 1 or not self.clusters >= 1 or not 0 <= self.relevant < math.inf:
            raise ValueError(
                f"geometric={self.geometric} must lie in 0..1, clusters={self.clusters} be 1 or more, "
                f"relevant={self.relevant} 0 or more"
            )
        if self.large < 1 or (self.regions is not None and self.regions < 1):
            raise ValueError(f"large={self.large} and regions={self.regions} must be 1 or more")

    @property
    def exact(self) -> bool:
        """Unless the router decides how many stay."""
        return self.counts == "ratio"

    def choose(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """Clusters, then paths among the tokens that stand for none."""
        states, grid, n = embeddings(signals, image), grid_of(image), image.tokens.numel()
        attention = importance(signals, image).float().nan_to_num(0, 0, 0)
        geometric, k = self.geometric, image.budget
        if self.weights is not None:
            question = signals.hidden[signals.question]
            share, rate = answer_of(self.weights, "dualcomp", Router, states, question)
            geometric, k = float(share), k if self.exact else max(1, round(float(rate) * n))
        n_path = round(geometric * k)
        peaks, row, column, value = self.semantic(unit_rows(states), attention, grid, k - n_path)
        taken = torch.zeros(n, dtype=torch.bool, device=peaks.device)
        taken[peaks] = True
        on_path = self.paths(states, relevance(signals, image), taken, grid, n_path)
        rows = torch.arange(peaks.numel(), k, device=peaks.device)
        part = torch.ones_like(on_path).float()
        if self.scaled:
            value, part = value * (1 - geometric), part * geometric
        weights = torch.cat((row, rows)), torch.cat((column, on_path)), torch.cat((value, part))
        return torch.cat((peaks, on_path)), sparse_weights(*weights, (k, n))

    def semantic(
        self, unit: Tensor, attention: Tensor, grid: tuple[int, int], k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where ``k`` clusters stand (k,), and row, column and value (M,) of what they become."""
        cluster = linked(unit, grid, min(len(unit), max(k, round(self.clusters * k))))
        size = torch.bincount(cluster)
        total = torch.zeros(size.numel(), device=unit.device).index_add_(0, cluster, attention)
        kept = ranking(total)[:k]
        row = torch.full_like(size, -1)
        row[kept] = torch.arange(k, device=unit.device)
        peak = place_in_group(attention, cluster) == 0
        first = peak.nonzero().flatten()
        peaks = torch.empty_like(first)
        peaks[cluster[first]] = first
        # The mean is plain where nothing in a cluster is attended to.
        share = torch.where(total > 0, 1 / total.clamp_min(1e-30), 0)[cluster] * attention
        share = torch.where(total[cluster] > 0, share, 1 / size[cluster])
        value = torch.where(size[cluster] >= self.large, share, peak.float())
        member = ((row[cluster] >= 0) & (value != 0)).nonzero().flatten()
        return peaks[kept], row[cluster[member]], member, value[member]

    def paths(self, states: Tensor, relevant: Tensor, taken: Tensor, grid: tuple[int, int], k: int) -> Tensor:
        """(k,) tokens of ``states`` (N, E) on paths, or else of most structure; none of those ``taken`` (N,)."""
        edge = unit_range(edges(states, grid))
        structure = edge * (1 + self.relevant * relevant)
        anchors = self._anchors(edge, grid, k)
        walked = torch.tensor(walk(structure.nan_to_num(0, 0, 0).tolist(), anchors, grid[1]), device=taken.device)
        along = torch.zeros_like(taken)
        along[walked] = True
        first = best_of_rest(structure, ~along | taken, min(k, int((along & ~taken).sum())))
        taken = taken.clone()
        taken[first] = True
        return torch.cat((first, best_of_rest(structure, taken, k - first.numel())))

    def _anchors(self, edge: Tensor, grid: tuple[int, int], k: int) -> list[int]:
        """The largest edge of each region, band by band, every second band backwards."""
        n = edge.numel()
        count = max(1, round(k * k / n)) if self.regions is None else min(self.regions, n)
        region, centre = partition(*grid, count)
        region = region.to(edge.device)
        first = (place_in_group(edge, region) == 0).nonzero().flatten()
        anchor = dict(zip(region[first].tolist(), first.tolist(), strict=True))
        bands: dict[int, list[int]] = {}
        for number, middle in enumerate(centre.tolist()):
            bands.setdefault(middle // grid[1], []).append(anchor[number])
        return [one for i, band in enumerate(bands.values()) for one in (band[::-1] if i % 2 else band)]


def linked(unit: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """(N,) ``count`` clusters, numbered, of ``unit`` (N, E) on a grid, by the strongest links to a neighbour before."""
    rows, columns = grid
    token = torch.arange(rows * columns, device=unit.device)
    row, column = token // columns, token % columns
    best, parent = torch.full((token.numel(),), -torch.inf, device=unit.device), token
    for down, across in NEIGHBOURS[:4]:
        there = ((row + down >= 0) & (column + across >= 0) & (column + across < columns)).nonzero().flatten()
        other = there + down * columns + across
        cosine = torch.full_like(best, -torch.inf).index_put_((there,), (unit[there] * unit[other]).sum(dim=1))
        better = cosine > best
        best, parent = torch.where(better, cosine, best), torch.where(better, token + down * columns + across, parent)
    links = ranking(best)[: token.numel() - count]
    root = token.index_put((links,), parent[links])
    for _ in range(token.numel().bit_length()):
        root = root[root]
    return root.unique(return_inverse=True)[1]


def edges(states: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N,) squared distance of each state (N, E) to the mean of the 3 x 3 around it, as far as these exist."""
    image = states.float().T.unflatten(1, grid)
    around = torch.nn.functional.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    return (image - around).square().sum(dim=0).flatten()


def walk(structure: list[float], anchors: list[int], columns: int) -> list[int]:
    """The tokens on the way from each anchor to the next, anchors included, on a grid with so many columns."""
    here, found, rows = anchors[0], [anchors[0]], len(structure) // columns
    for goal in anchors[1:]:
        down, across = divmod(goal, columns)
        while here != goal:
            row, column = divmod(here, columns)
            far = max(abs(row - down), abs(column - across))
            near = [
                (r, c)
                for r, c in ((row + i, column + j) for i, j in NEIGHBOURS)
                if 0 <= r < rows and 0 <= c < columns and max(abs(r - down), abs(c - across)) < far
            ]
            here = max((r * columns + c for r, c in near), key=structure.__getitem__)
            found.append(here)
    return found
