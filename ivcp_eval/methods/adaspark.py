"""Reads videos by cubes: a token attends to the cubes that its query matches, and MLPs process the strongest tokens.

Paper: https://arxiv.org/abs/2604.08077 (AdaSpark: cube-selective attention and token-selective FFN, by top-p).
Reference: none; the abstract and notes on it are public.

The grid of a video is divided into cubes of frames, rows and columns. In every layer each visual token's query meets
the mean key of every cube before its own, ``softmax(q . mean k / sqrt(d))``; the largest of these until they hold the
mass p are the cubes that it attends to, beside its own cube. In the MLP, the tokens of a cube that are longest until
they hold p of its lengths (L2) are processed; the others get the mean update of those. Text attends to everything,
everything attends to the text before it, and text is always processed. All of this is simulated by masks: no token
leaves, answers are exact, and what would be saved is counted (`ratio_flops_analytic`). A budget in FLOPs holds that
count; budgets of tokens cannot be held. Decoding attends to everything.

Differs: p, the size of a cube, the layers, whether heads choose alone and what a cube before means are not public, and
the published model was fine-tuned for this; so it is a variant, untuned. Each is a field but the last: cubes count by
frames, rows, columns, and those of a lower number come before, causality holding inside them. Without ``p`` it is,
in every layer, the one that fits the retention ratio: the share of the pairs of visual tokens that are looked at (never
fewer than own cubes have) and of visual tokens that are processed (never fewer than one of a cube). A picture is a
video of one frame; images and frames that are no grid (tiles, newlines) are one row, cut into stretches of as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, ModelFacts, Processed, Signal, Signals
from ivcp_eval.interface.ops import to_device
from ivcp_eval.methods._uncut import Uncut

_CUBES = "adaspark"


@dataclass(frozen=True)
class Method(Uncut):
    """AdaSpark.

    Attributes:
        p: mass of the cubes that are attended to and of the tokens that are processed, in (0, 1]; None: what fits the
            retention ratio.
        cube: frames (grid steps), rows and columns of a cube.
        first: the first sparse layer, 0-based; all behind it are.
        heads: "each" chooses its own cubes; by the "mean" of their probabilities all choose the same.
        queries: "token": each chooses; "cube": those of one cube choose together, by the mean of their probabilities.
        rotated: whether queries and keys meet as in the attention, positions applied; the mean is then of such keys.
        attention, mlp: whether that half is sparse.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"sparse"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    p: float | None = None
    cube: tuple[int, int, int] = (4, 4, 4)
    first: int = 0
    heads: Literal["each", "mean"] = "each"
    queries: Literal["token", "cube"] = "token"
    rotated: bool = True
    attention: bool = True
    mlp: bool = True

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        object.__setattr__(self, "cube", tuple(self.cube))
        if len(self.cube) != 3 or any(not isinstance(side, int) or side < 1 for side in self.cube):
            raise ValueError(f"cube={self.cube} must be frames, rows and columns, each a whole number of 1 or more")
        if self.first < 0 or (self.p is not None and not 0 < self.p <= 1):
            raise ValueError(f"first={self.first} must be a layer, 0 or later, p={self.p} lie in (0, 1]")
        for name, allowed in (("heads", ("each", "mean")), ("queries", ("token", "cube"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}")
        if not (self.attention or self.mlp):
            raise ValueError("attention=False and mlp=False leave nothing sparse; use the method none")

    def attended_pairs(self, signals: Signals) -> Tensor | None:
        """(H, V, V) or, where heads choose together, (V, V) bool: its own cube, and the chosen ones before."""
        assert signals.cut is not None
        if not self.attention or signals.cut.layer < self.first:
            return None
        own = self._cubes(signals)
        chance = self._probabilities(signals, own)
        ahead = _mass_ahead(chance)
        earlier = torch.arange(chance.shape[-1], device=own.device) < own[:, None]  # (V, C)
        if self.p is not None:
            taken = earlier & (ahead < self.p)
        else:
            n = len(own)
            size = torch.nn.functional.one_hot(own, chance.shape[-1]).cumsum(0)  # of a cube up to and with the query
            itself = int(size.gather(1, own[:, None]).sum())
            left = max(0.0, signals.cut.ratio * n * (n + 1) / 2 - itself) * len(chance)
            taken = torch.zeros_like(ahead, dtype=torch.bool)
            candidate = earlier.expand_as(ahead)
            taken[candidate] = _cheapest(ahead[candidate], chance[candidate], size.expand_as(ahead)[candidate], left)
        taken = taken | torch.nn.functional.one_hot(own, chance.shape[-1]).bool()
        seen: Tensor = taken[:, :, own]
        return seen if self.heads == "each" else seen[0]

    def sparse_shares(self, model: ModelFacts, ratio: float, n_visual: int) -> Sequence[tuple[float, float]]:
        """The ratio in every sparse layer, but no less than cubes need; none with a ``p``, which takes its place."""
        if self.p is not None:
            return ()
        size = min(prod(self.cube), n_visual)
        pairs = max(ratio, (size + 1) / (n_visual + 1)) if self.attention else 1.0
        processed = max(ratio, 1 / size) if self.mlp else 1.0
        return [(pairs, processed) if layer >= self.first else (1.0, 1.0) for layer in range(model.n_layers)]

    def mlp_tokens(self, signals: Signals, states: Tensor) -> Processed | None:
        """The longest tokens of every cube."""
        assert signals.cut is not None
        if not self.mlp or signals.cut.layer < self.first:
            return None
        own = self._cubes(signals)
        length = torch.nan_to_num(states.float().norm(dim=-1), posinf=torch.finfo(torch.float32).max)
        total = torch.zeros(len(own), device=own.device).index_add_(0, own, length)[own]
        share = length / total.clamp_min(torch.finfo(torch.float32).tiny)
        order = share.argsort(descending=True, stable=True)
        order = order[own[order].argsort(stable=True)]  # cube after cube, the longest of each first
        inside = own[order]
        running = share[order].double().cumsum(0)
        starts = torch.cat((inside.new_ones(1, dtype=torch.bool), inside[1:] != inside[:-1]))
        before = torch.cat((running.new_zeros(1), running[:-1]))
        ahead = torch.empty_like(running)
        ahead[order] = before - before[starts][starts.cumsum(0) - 1]
        longest = torch.zeros(len(own), dtype=torch.bool, device=own.device)
        longest[order[starts]] = True
        if self.p is not None:
            return Processed(longest | (ahead < self.p), own)
        return Processed(longest | _cheapest(ahead, share, torch.ones_like(own), signals.budget), own)

    def _cubes(self, signals: Signals) -> Tensor:
        """(V,) int64: the cube of each visual token, counted through the row."""
        kept: Tensor | None = signals.memory.get(_CUBES)
        if kept is None or len(kept) != signals.n_visual:
            kept = signals.memory[_CUBES] = cubes(signals, self.cube)
        return to_device(kept, signals.visual.device)

    def _probabilities(self, signals: Signals, own: Tensor) -> Tensor:
        """(H or 1, V, C) float32: how each query's attention spreads over the cubes before its own; 0 elsewhere."""
        assert signals.project is not None
        assert signals.rotate is not None
        query, key = signals.project("query"), signals.project("key")
        if self.rotated:
            query, key = signals.rotate(query), signals.rotate(key)
        query, key = query[:, signals.visual].float(), key[:, signals.visual].float()
        count = int(own.max()) + 1
        sums = torch.zeros(key.shape[0], count, key.shape[2], device=key.device).index_add_(1, own, key)
        mean = sums / torch.bincount(own, minlength=count)[:, None]
        logits = query.unflatten(0, (key.shape[0], -1)) @ mean.transpose(1, 2)[:, None]
        later = torch.arange(count, device=own.device) >= own[:, None]
        logits = (logits.flatten(0, 1) / key.shape[2] ** 0.5).masked_fill(later, -torch.inf)
        chance = torch.nan_to_num(logits.softmax(dim=-1))  # a token of the first cube has none to choose from
        if self.heads == "mean":
            chance = chance.mean(dim=0, keepdim=True)
        if self.queries == "cube":
            joint = torch.zeros(len(chance), count, count, device=own.device).index_add_(1, own, chance)
            chance = (joint / torch.bincount(own, minlength=count)[:, None])[:, own]
        return chance


def cubes(signals: Signals, sides: tuple[int, int, int]) -> Tensor:
    """(V,) int64 on the host: the cube of each visual token, numbered by frames, then rows, then columns."""
    found, first = torch.zeros(signals.n_visual, dtype=torch.int64), 0
    for clip in signals.clips:
        for start in range(0, len(clip), sides[0]):
            frames = clip[start : start + sides[0]]
            places = [_places(frame, sides) for frame in frames]
            width = max(int(column.max()) for _, column in places) + 1
            for frame, (row, column) in zip(frames, places, strict=True):
                found[frame.tokens.cpu()] = first + row * width + column
            first = int(found.max()) + 1
    return torch.unique(found, return_inverse=True)[1]


def _places(frame: Image, sides: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(N,), (N,): in which row and column of cubes each token of a frame is."""
    n = frame.tokens.numel()
    place = torch.arange(n)
    grid = frame.span.grid
    if grid is None or grid[0] * grid[1] != n:
        return torch.zeros_like(place), place // (sides[1] * sides[2])
    return place // grid[1] // sides[1], place % grid[1] // sides[2]


def _mass_ahead(chance: Tensor) -> Tensor:
    """(H, V, C): what the cubes hold that come before each one, the largest first; equal ones by their number."""
    value, order = chance.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(chance).scatter_(-1, order, value.cumsum(-1) - value)


def _cheapest(ahead: Tensor, share: Tensor, cost: Tensor, limit: float) -> Tensor:
    """(N,) bool: what one p takes of all lists, the largest with which the sum of ``cost`` (N,) is within ``limit``.

    Of those with equally much ``ahead``, the larger ``share`` comes first.
    """
    order = share.argsort(descending=True, stable=True)
    order = order[ahead[order].argsort(stable=True)]
    taken = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    taken[order] = cost[order].double().cumsum(0) <= limit
    return taken
