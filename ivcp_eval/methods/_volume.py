"""The tokens that span the largest volume, chosen greedily in few rounds; several groups of tokens at once.

A round guesses: of the tokens of the largest gains it picks one after the other on the host, as if there were no
others. Then the gains of all tokens at each of these picks come from one product, and the picks stay up to the first
at which a token outside was better. So the choices are those of picking one at a time, and a round ends where a choice
would be another, not where a bound no longer proves it. Memory is linear in the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ivcp_eval.interface.ops import LOWEST, best_of_rest

MOST = 1024  # candidates of a round
Array = NDArray[np.floating]


@torch.no_grad()
def largest_volumes(groups: Sequence[Tensor], budgets: Sequence[int]) -> list[Tensor]:
    """Of each group's features (N_g, D), as many indices as its budget says, in order of choice.

    Each next one makes the determinant of F F^T restricted to the chosen largest. Beyond the rank of the features
    nothing adds to it; there the longest of the rest follow. Ties fall to the lower index; features that are not
    finite come last.
    """
    features = torch.nn.utils.rnn.pad_sequence([group.float() for group in groups], batch_first=True)
    length = features.square().sum(dim=2).masked_fill(~features.isfinite().all(dim=2), LOWEST)
    for row, group in zip(length, groups, strict=True):
        row[len(group) :] = -torch.inf  # no token
    found = []
    chosen = _chosen(features.nan_to_num_(0, 0, 0), length, budgets)
    for row, group, own, k in zip(length, groups, chosen, budgets, strict=True):
        first = torch.tensor(own, dtype=torch.int64, device=row.device)
        taken = torch.zeros(len(group), dtype=torch.bool, device=row.device)
        taken[first] = True
        found.append(torch.cat((first, best_of_rest(row[: len(group)], taken, k - len(own)))))
    return found


def _chosen(features: Tensor, length: Tensor, budgets: Sequence[int]) -> list[list[int]]:
    """What adds to the volume, group by group, in order of choice.

    Args:
        features: (G, N, D), overwritten: what each has outside the span of the chosen. length: (G, N) squared, -inf
            where there is no token.
    """
    many, n, _ = features.shape
    device, size = features.device, min(n, MOST, max(256, n // 8), max(16, n // 4))
    least = (1e-6 * length.amax(dim=1).clamp_min(0)).tolist()
    group = torch.arange(many, device=device)[:, None]
    earlier = torch.ones(size, size, device=device).triu(1)  # (picks, picks): which come before which
    chosen: list[list[int]] = [[] for _ in budgets]
    gain, reach = length, max(1, size // 8)
    while True:
        gains, order = gain.sort(dim=1, descending=True, stable=True)
        candidates = order[:, :size]
        own = features[group, candidates]
        kernel, names, value = (one.cpu().numpy() for one in (own @ own.mT, candidates, gains[:, :size]))
        guesses = [
            _guess(kernel[g], value[g], names[g], least[g], min(reach, k - len(chosen[g])))
            for g, k in enumerate(budgets)
        ]
        most = max(len(guess.places) for guess in guesses)
        if not most:
            return chosen
        inverse, stays = np.zeros((many, most, size), np.float32), np.zeros((many, most, 1), np.float32)
        for g, guess in enumerate(guesses):
            inverse[g, : len(guess.places), guess.places] = np.linalg.inv(guess.factor).T
        axes = torch.from_numpy(inverse).to(device) @ own  # (G, M, D): orthonormal, those of the picks
        parts = features @ axes.mT  # (G, N, M)
        squares = parts.square()
        before = earlier[:most, :most].expand(many, -1, -1)
        outside = gain.scatter(1, candidates, -torch.inf)[:, :, None]
        best, whose = (one.cpu().numpy() for one in torch.baddbmm(outside, squares, before, alpha=-1).max(dim=1))
        taken, kept = list[int](), 1
        for g, guess in enumerate(guesses):
            new = names[g, guess.places].tolist()
            # The first is the best of all.
            good = [(guess.gains[i], -name) > (best[g, i], -whose[g, i]) for i, name in enumerate(new)]
            count = good.index(False, 1) if False in good[1:] else len(new)
            chosen[g] += new[:count]
            taken += [g * n + name for name in new[:count]]
            stays[g, :count], kept = 1, max(kept, count)
        staying = torch.from_numpy(stays).to(device)
        gain = torch.baddbmm(gain[:, :, None], squares, staying, alpha=-1)[:, :, 0]
        gain.view(-1).index_fill_(0, torch.tensor(taken, device=device), -torch.inf)
        features.baddbmm_(parts, axes * staying, alpha=-1)
        reach = min(max(16, kept * 3 // 2), max(1, size // 2))


@dataclass(frozen=True)
class _Guess:
    """Picks among candidates: their places, their gains when picked, and the (M, M) Cholesky factor of their kernel."""

    places: list[int]
    gains: list[float]
    factor: Array


def _guess(kernel: Array, value: Array, names: NDArray[np.integer], least: float, most: int) -> _Guess:
    """At most ``most`` picks of gains above ``least`` among B candidates of the ``kernel`` (B, B), with gains (B,)."""
    value, columns = value.astype(float), np.zeros((most, len(names)))  # row i: column i of the Cholesky factor
    places, gains = list[int](), list[float]()
    while len(places) < most:
        top = value.max()
        if not top > least:  # NaN included
            break
        ties = np.flatnonzero(value == top)
        place = int(ties[names[ties].argmin()])
        done = columns[: len(places)]
        column = kernel[place] - done[:, place] @ done
        column /= np.sqrt(max(column[place], 1e-30))
        columns[len(places)] = column
        value -= column**2
        value[place] = -np.inf
        places.append(place)
        gains.append(float(top))
    return _Guess(places, gains, np.tril(columns[: len(places), places].T))
