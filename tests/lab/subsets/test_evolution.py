"""The search by itself, on losses that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ivcp_eval.lab.subsets.evolution import Found, Settings, covered, search, token_groups

N, BUDGET = 40, 8
GROUPS = torch.arange(N) % 10
WANTED = torch.tensor([1, 5, 11, 17, 23, 29, 31, 37])


def missing(subsets: Tensor) -> Tensor:
    """How many of the wanted tokens a subset lacks."""
    return BUDGET - torch.isin(subsets, WANTED).sum(dim=1).float()


def found(seed: int = 0, budget: int = BUDGET, groups: Tensor = GROUPS, **settings: float) -> Found:
    return search(missing, groups, budget, Settings(**settings), torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def test_a_seed_gives_one_result() -> None:
    one, again = found(3), found(3)
    assert one.subset.equal(again.subset)
    assert (one.curve, one.asked) == (again.curve, again.asked)
    assert len({found(seed, generations=0).curve for seed in range(6)}) > 1


@pytest.mark.parametrize("budget", [1, 7, N - 1, N])
def test_a_subset_has_as_many_tokens_as_the_budget(budget: int) -> None:
    shapes = []

    def losses(subsets: Tensor) -> Tensor:
        shapes.append(tuple(subsets.shape[1:]))
        assert (subsets[:, 1:] > subsets[:, :-1]).all()
        assert subsets.min() >= 0
        assert subsets.max() < N
        return missing(subsets)

    result = search(losses, GROUPS, budget, Settings(12, 4, 3), torch.Generator().manual_seed(0))
    assert set(shapes) == {(budget,)}
    assert result.subset.numel() == result.subset.unique().numel() == budget


def test_the_best_is_never_lost_and_better_than_as_many_random_ones() -> None:
    result = found(diversity=0.0)
    assert list(result.curve) == sorted(result.curve, reverse=True)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randperm(N, generator=generator)[:BUDGET] for _ in range(result.asked)])
    assert result.loss < missing(drawn).min() - 1
    assert result.loss == missing(result.subset[None]).item()


def test_no_loss_is_computed_twice() -> None:
    seen: list[bytes] = []

    def losses(subsets: Tensor) -> Tensor:
        seen.extend(subset.numpy().tobytes() for subset in subsets)
        return missing(subsets)

    result = search(losses, GROUPS, 2, Settings(24, 6, 8), torch.Generator().manual_seed(0))
    assert len(seen) == len(set(seen)) == result.asked


def test_diversity_buys_groups() -> None:
    alike = torch.tensor([0] * 30 + [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    costs = found(groups=alike, diversity=100.0)
    assert costs.covered == 1
    assert int(covered(costs.subset[None], alike)) == BUDGET
    assert found(groups=alike, diversity=0.0).covered < 1


def test_the_first_population_goes_round_the_groups() -> None:
    result = found(generations=0, diversity=0.0)
    assert int(covered(result.subset[None], GROUPS)) == BUDGET


def test_groups_are_the_nearest_words() -> None:
    words = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert token_groups(torch.tensor([[3.0, 1.0], [0.1, 0.2]]), words).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"parents": 1}, "at least 2"), ({"population": 3, "parents": 4}, "at least 2"), ({"crossover": 1.5}, "0..1")],
)
def test_settings_that_no_search_can_mean_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, N + 1])
def test_a_budget_that_no_subset_can_have_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget of {budget} is outside 1..{N}"):
        found(budget=budget)
