"""Greedy selections in few large steps: the choices of picking one at a time, from a few hundred operations.

Choosing a token never raises the gain of another one, so a gain that was computed earlier bounds the gain now. Each
round takes the tokens of the largest gains, works out on the host how they influence each other, and picks among them
as long as no token outside could be better; then the gains are renewed at once. Memory is linear in the tokens. Ties
fall to the lower index; states that are not finite come last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ivcp_eval.interface.ops import (
    LOWEST,
    best_of_rest,
    block_rows,
    first_best,
    max_similarity,
    ranking,
    unit_rows,
)
from ivcp_eval.methods._volume import largest_volumes

SLACK = 1e-5  # more than the rounding error of a cosine

Array = NDArray[np.floating]


@torch.no_grad()
def farthest_points(states: Tensor, k: int) -> Tensor:
    """``k`` indices of ``states`` (N, E), increasing: greedy max-min selection by cosine distance.

    Starts with the state whose nearest neighbour is farthest.
    """
    unit = unit_rows(states)
    first = most_isolated(unit)
    return torch.tensor(_greedy(_Spread(unit, torch.zeros(len(unit)), 1.0, [first]), k), device=states.device).sort()[0]


@torch.no_grad()
def farthest_from(states: Tensor, chosen: Tensor, k: int) -> Tensor:
    """``chosen`` (M,), M > 0, and after them those of ``states`` (N, E) that max-min selection adds, ``k`` in all."""
    unit = unit_rows(states)
    state = _Spread(unit, torch.zeros(len(unit)), 1.0, chosen.tolist())
    return torch.tensor(_greedy(state, k), device=states.device)


@torch.no_grad()
def marginal_relevance(states: Tensor, relevance: Tensor, k: int, trade: float, together: int = 1) -> Tensor:
    """``k`` indices of ``states`` (N, E) in order of choice, beginning with the most relevant.

    Each next one has the largest (1 - trade) * relevance - trade * largest cosine to one that is chosen; ``together``
    are chosen at a time, not looking at each other.
    """
    unit, bias = unit_rows(states), (1 - trade) * relevance
    if together == 1:
        return torch.tensor(_greedy(_Spread(unit, bias, trade, [int(ranking(relevance)[0])]), k), device=unit.device)
    chosen, covered = ranking(relevance)[: min(together, k)], torch.full_like(bias, -torch.inf)
    taken, new = torch.zeros_like(bias, dtype=torch.bool), chosen
    while chosen.numel() < k:
        taken[new] = True
        covered = torch.maximum(covered, max_similarity(unit, unit[new]))
        new = best_of_rest(bias - trade * covered, taken, min(together, k - chosen.numel()))
        chosen = torch.cat((chosen, new))
    return chosen


@torch.no_grad()
def log_determinant(features: Tensor, k: int, ridge: float) -> Tensor:
    """``k`` indices of ``features`` (N, D) in order of choice: each next one makes the determinant largest.

    The determinant is that of ``ridge * I + F F^T`` restricted to the chosen. Beyond the rank of the features nothing
    adds to it (without a ridge); there the longest of the rest follow.
    """
    if not ridge:
        return largest_volumes([features], [k])[0]
    clean = features.float().nan_to_num(0, 0, 0)
    length = clean.square().sum(dim=1).masked_fill(~features.isfinite().all(dim=1), LOWEST)
    return torch.tensor(_greedy(_Determinant(clean, length, ridge), k), device=length.device)


@torch.no_grad()
def coverage(states: Tensor, weight: Tensor, k: int) -> Tensor:
    """``k`` indices of ``states`` (N, E) in order of choice: each next one covers most that is not covered yet.

    A gain is weight_j * sum over i of max(0, cos(i, j) - largest cosine of i to one that is chosen, at least 0).
    """
    return torch.tensor(_greedy(_Coverage(unit_rows(states), weight), k), device=states.device)


def most_isolated(unit: Tensor) -> int:
    """The row of ``unit`` (N, E) whose largest inner product with another row is least; rows of zeros come last.

    Compared with a part of the rows at a time; what some row of known nearest neighbour already beats is left out.
    """
    places = torch.arange(len(unit), device=unit.device)
    alive = unit.any(dim=1).nonzero().flatten()
    if alive.numel() < 2:
        return int(alive) if alive.numel() else 0
    nearest, limit = torch.full_like(alive, -torch.inf, dtype=torch.float32), torch.inf
    for columns in places.split(block_rows(len(unit))):
        similarity = unit[alive] @ unit[columns].T
        own = (alive >= columns[0]) & (alive <= columns[-1])
        similarity[own, alive[own] - columns[0]] = -torch.inf
        nearest = torch.maximum(nearest, similarity.amax(dim=1))
        best = alive[nearest.argmin()]
        whole = (unit @ unit[best]).index_fill(0, best, -torch.inf)
        limit = min(limit, float(whole.amax()) + SLACK)
        stays = nearest <= limit
        alive, nearest = alive[stays], nearest[stays]
    return int(alive[first_best(-nearest)])


class _Round(ABC):
    """Gains of N tokens while some are chosen, and what a round needs to know of its candidates."""

    gain: Tensor  # (N,) of each token, or an upper bound
    chosen: list[int]
    least: float = -np.inf  # nothing is chosen for a gain of this or less
    most: int  # candidates of a round
    bounded = False  # whether `gain`, `open` and `pick` give upper bounds, which `exact` makes exact

    @abstractmethod
    def open(self, candidates: Tensor) -> Array:
        """(B,) gains of these tokens."""

    @abstractmethod
    def pick(self, place: int, value: Array) -> Array:
        """Gains of the candidates once the one at ``place`` is chosen."""

    def exact(self, place: int) -> float:
        """The gain of the candidate at ``place``."""
        raise NotImplementedError

    @abstractmethod
    def close(self, candidates: Tensor, value: Array, new: list[int], picked: Tensor) -> None:
        """Renew `gain` after the candidates at the places ``new``, ``picked``, were chosen, in this order.

        ``value``: the candidates' last gains.
        """


def _greedy(state: _Round, k: int) -> list[int]:
    """What is chosen already and further tokens up to ``k``, in order of choice; fewer at the least gain."""
    n, chosen = state.gain.numel(), state.chosen
    taken = torch.zeros(n, dtype=torch.bool, device=state.gain.device)
    taken[chosen] = True
    size = min(state.most, max(256, n // 8), max(16, n // 4))
    while len(chosen) < k:
        order = state.gain.masked_fill(taken, -torch.inf).sort(descending=True, stable=True).indices
        order = order[: min(size + 1, n - len(chosen))]
        bound = (-np.inf, n)  # the best gain outside, and whose it is
        if n - len(chosen) > size:
            order, outside = order[:-1], int(order[-1])
            bound = (float(state.gain[outside]), outside)
        candidates = order.sort().values
        names, new = candidates.tolist(), list[int]()
        value = state.open(candidates)
        exact = np.full(len(names), not state.bounded)
        while len(chosen) < k and len(new) < len(names):
            place = int(value.argmax())
            if not exact[place]:
                value[place], exact[place] = min(value[place], state.exact(place)), True
                continue
            if (value[place], -names[place]) <= (bound[0], -bound[1]):
                break
            if value[place] <= state.least:
                return chosen
            chosen.append(names[place])
            new.append(place)
            value = state.pick(place, value)
            value[new] = -np.inf
            exact[:] = not state.bounded
        picked = candidates[new]
        taken[picked] = True
        state.close(candidates, value, new, picked)
    return chosen


class _Spread(_Round):
    """Gain: bias_j - weight * largest cosine to one that is chosen."""

    most = 1024

    def __init__(self, unit: Tensor, bias: Tensor, weight: float, chosen: list[int]) -> None:
        self.unit, self.weight, self.chosen = unit, weight, chosen
        self.bias = bias.to(unit.device).float().nan_to_num(LOWEST).masked_fill(~unit.any(dim=1), LOWEST)
        self.covered = max_similarity(unit, unit[chosen])
        self._renew()

    def _renew(self) -> None:
        self.gain = torch.sub(self.bias, self.covered, alpha=self.weight).clamp_min_(LOWEST)

    def open(self, candidates: Tensor) -> Array:
        own = self.unit[candidates]
        instead = torch.addmm(self.bias[candidates], own, own.T, alpha=-self.weight)
        self.instead = instead.clamp_min_(LOWEST).cpu().numpy()
        value: Array = self.gain[candidates].cpu().numpy()
        return value

    def pick(self, place: int, value: Array) -> Array:
        return np.minimum(value, self.instead[place], out=value)

    def close(self, candidates: Tensor, value: Array, new: list[int], picked: Tensor) -> None:
        self.covered = torch.maximum(self.covered, max_similarity(self.unit, self.unit[picked]))
        self._renew()


class _Determinant(_Round):
    """Gain: the squared length of a feature, plus the ridge (above 0), conditional on what is chosen.

    `rest` is the matrix M of the conditional inner product f_i^T M f_j.
    """

    most = 512

    def __init__(self, features: Tensor, length: Tensor, ridge: float) -> None:
        self.features, self.ridge, self.chosen = features, ridge, []
        self.rest = torch.eye(features.shape[1], device=features.device)
        self.gain = (length + ridge).clamp_min(LOWEST)

    def open(self, candidates: Tensor) -> Array:
        own = self.features[candidates]
        self.kernel = (own @ self.rest @ own.T).cpu().numpy().astype(float) + self.ridge * np.eye(len(own))
        self.columns = np.zeros_like(self.kernel)  # row i: column i of the Cholesky factor
        self.count = 0
        value: Array = self.gain[candidates].cpu().numpy().astype(float)
        return value

    def pick(self, place: int, value: Array) -> Array:
        done = self.columns[: self.count]
        column = self.kernel[:, place] - done[:, place] @ done
        column /= np.sqrt(max(column[place], 1e-30))
        self.columns[self.count] = column
        self.count += 1
        return np.subtract(value, column**2, out=value)

    def close(self, candidates: Tensor, value: Array, new: list[int], picked: Tensor) -> None:
        factor = self.columns[: len(new), new].T  # lower triangular, in order of choice
        inverse = torch.from_numpy(np.linalg.inv(factor).astype(np.float32)).to(self.rest.device)
        axes = self.rest @ self.features[picked].T @ inverse.T  # (D, m)
        self.gain = (self.gain - (self.features @ axes).square().sum(dim=1)).clamp_min(LOWEST)
        self.rest = torch.addmm(self.rest, axes, axes.T, alpha=-1)


class _Coverage(_Round):
    """Gain: as in `coverage`. Most gains never need to be renewed."""

    most = 2048
    bounded = True

    def __init__(self, unit: Tensor, weight: Tensor) -> None:
        self.unit, self.chosen = unit, []
        weight = weight.float().nan_to_num(0, 0, 0)
        total = torch.cat([(rows @ unit.T).clamp_min(0).sum(dim=1) for rows in unit.split(block_rows(len(unit)))])
        self.gain = (weight * total).masked_fill(~unit.any(dim=1), LOWEST)
        self.weight: Array = weight.cpu().numpy()
        self.covered: Array = np.zeros(len(unit), dtype=np.float32)
        self.cosines: dict[int, Array] = {}  # of candidates to all tokens; most are candidates again

    def open(self, candidates: Tensor) -> Array:
        self.names = candidates.tolist()
        new = [name for name in self.names if name not in self.cosines]
        found: Array = (self.unit[new] @ self.unit.T).cpu().numpy()
        self.cosines = {name: self.cosines[name] for name in self.names if name in self.cosines}
        self.cosines |= zip(new, found, strict=True)
        value: Array = self.gain[candidates].cpu().numpy()
        return value

    def pick(self, place: int, value: Array) -> Array:
        self.covered = np.maximum(self.covered, self.cosines[self.names[place]])
        return value

    def exact(self, place: int) -> float:
        name = self.names[place]
        return float(np.maximum(self.cosines[name] - self.covered, 0).sum() * self.weight[name])

    def close(self, candidates: Tensor, value: Array, new: list[int], picked: Tensor) -> None:
        self.gain[candidates] = torch.from_numpy(np.maximum(value, LOWEST)).to(self.gain)
