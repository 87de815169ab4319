"""Oracle: the same selections one at a time, in double precision, with every similarity held."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ivcp_eval.methods import _greedy
from ivcp_eval.methods._volume import largest_volumes


def states(n: int, width: int, seed: int, clusters: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, width, generator=generator)
    if not clusters:
        return noise
    centres = torch.randn(clusters, width, generator=generator)
    return centres[torch.randint(clusters, (n,), generator=generator)] + 0.4 * noise


def one_by_one(n: int, k: int, gain: Callable[[int, list[int]], float], chosen: list[int]) -> list[int]:
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (gain(i, chosen), -i)))
    return chosen


CASES = [(400, 8, 150, 0), (400, 8, 150, 12), (70, 5, 60, 3), (40, 30, 40, 0)]


@pytest.mark.parametrize(("n", "width", "k", "clusters"), CASES)
def test_marginal_relevance(n: int, width: int, k: int, clusters: int) -> None:
    x = states(n, width, 0, clusters)
    relevance = torch.rand(n, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    cosine = (unit @ unit.T).tolist()

    def gain(i: int, chosen: list[int]) -> float:
        return 0.6 * float(relevance[i]) - 0.4 * max(cosine[i][j] for j in chosen)

    wanted = one_by_one(n, k, gain, [int(relevance.argmax())])
    assert _greedy.marginal_relevance(x, relevance, k, 0.4).tolist() == wanted


@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize(("n", "width", "k", "clusters"), [(150, 40, 30, 0), (300, 24, 20, 8), (60, 50, 45, 0)])
def test_log_determinant(n: int, width: int, k: int, clusters: int, ridge: float) -> None:
    x = states(n, width, 2, clusters)
    kernel = x.double() @ x.double().T + ridge * torch.eye(n)

    def gain(i: int, chosen: list[int]) -> float:
        own = [*chosen, i]
        return float(torch.linalg.slogdet(kernel[own][:, own]).logabsdet)

    assert _greedy.log_determinant(x, k, ridge).tolist() == one_by_one(n, k, gain, [])


def test_largest_volumes_of_several_groups() -> None:
    """Many rounds, groups of unequal size and budget; the oracle removes what is chosen from all others."""
    groups = [states(n, 160, seed) * torch.linspace(1, 1.6, n)[:, None] for n, seed in ((900, 5), (611, 6))]
    budgets, oracle = [150, 40], []
    for group, k in zip(groups, budgets, strict=True):
        rest, chosen = group.double(), []
        for _ in range(k):
            gain = rest.square().sum(dim=1)
            gain[chosen] = -1
            chosen.append(int(gain.argmax()))
            axis = rest[chosen[-1]] / rest[chosen[-1]].norm()
            rest = rest - (rest @ axis)[:, None] * axis
        oracle.append(chosen)
    assert [one.tolist() for one in largest_volumes(groups, budgets)] == oracle


def test_beyond_the_rank_the_longest_follow() -> None:
    x = states(30, 4, 3)
    order = _greedy.log_determinant(x, 12, ridge=0.0).tolist()
    assert sorted(set(order)) == sorted(order)
    rest = [i for i in range(30) if i not in order[:4]]
    assert order[4:] == sorted(rest, key=lambda i: -float(x[i].norm()))[:8]


@pytest.mark.parametrize(("n", "width", "k", "clusters"), CASES)
def test_coverage(n: int, width: int, k: int, clusters: int) -> None:
    x = states(n, width, 4, clusters)
    weight = torch.rand(n, generator=torch.Generator().manual_seed(5)) + 0.1
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    cosine, covered, chosen = unit @ unit.T, torch.zeros(n, dtype=torch.float64), []
    for _ in range(min(k, 60)):
        gain = (cosine - covered).clamp_min(0).sum(dim=1) * weight
        gain[chosen] = -math.inf
        chosen.append(int(gain.argmax()))
        covered = torch.maximum(covered, cosine[chosen[-1]])
    assert _greedy.coverage(x, weight, k).tolist()[:60] == chosen


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_states_are_chosen_in_order(value: float) -> None:
    x, even = torch.full((40, 3), value), torch.ones(40)
    assert _greedy.coverage(x, even, 5).tolist() == list(range(5))
    assert _greedy.marginal_relevance(x, even, 5, 0.5).tolist() == list(range(5))
    assert _greedy.log_determinant(x, 5, 1.0).tolist() == list(range(5))
    assert _greedy.farthest_points(x, 5).tolist() == list(range(5))


def test_broken_states_come_last() -> None:
    x = states(40, 6, 6)
    x[[3, 17]] = torch.tensor([[math.nan], [math.inf]])
    even = torch.ones(40)
    for order in (
        _greedy.coverage(x, even, 40),
        _greedy.marginal_relevance(x, even, 40, 0.5),
        _greedy.log_determinant(x, 40, 1.0),
    ):
        assert order.tolist()[38:] == [3, 17]


def test_few_operations_whatever_the_budget() -> None:
    """Rounds do not become as many as tokens."""
    rounds: list[int] = []

    class Counted(_greedy._Spread):
        def close(self, candidates: Tensor, value: _greedy.Array, new: list[int], picked: Tensor) -> None:
            rounds.append(len(new))
            super().close(candidates, value, new, picked)

    unit = torch.nn.functional.normalize(states(4000, 32, 7), dim=1)
    assert len(_greedy._greedy(Counted(unit, torch.zeros(4000), 1.0, [0]), 2000)) == 2000
    assert len(rounds) < 40
