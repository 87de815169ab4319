"""Oracle: the cost, the rounds and the plan with Python floats, E included in the kernel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ivcp_eval.interface import Image, ModelFacts, Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import best, random_signals


def slow_scores(signals: Signals, image: Image, parameters: dict[str, Any]) -> list[float]:
    assert signals.normed is not None
    given = {name: parameters.get(name, 1.0) for name in ("feature", "relative", "central")}
    sigma, epsilon = parameters.get("sigma", 0.125), parameters.get("epsilon", 0.1)
    at = signals.visual[image.tokens]
    source = [x.double() / x.double().norm() for x in signals.hidden[at]]
    target = [x.double() / x.double().norm() for x in signals.normed()[at]]
    n = len(source)
    assert image.span.grid is not None
    rows, columns = image.span.grid
    where = [(r / max(1, rows - 1), c / max(1, columns - 1)) for r in range(rows) for c in range(columns)]
    middle = (sum(y for y, _ in where) / n, sum(x for _, x in where) / n)
    distance = [[float((s - t).norm()) for t in target] for s in source]
    scale = math.sqrt(sum(d * d for row in distance for d in row) / n**2)
    off = [math.dist(place, middle) for place in where]
    far = max(off) or 1.0
    cost = [
        [
            given["feature"] * distance[i][j] / scale
            + given["relative"] * (1 - math.exp(-(math.dist(where[i], where[j]) ** 2) / (2 * sigma**2)))
            + given["central"] * off[i] / far
            for j in range(n)
        ]
        for i in range(n)
    ]
    kernel = [[math.exp(-c / epsilon) for c in row] for row in cost]
    u, v = [1.0] * n, [1.0] * n
    for _ in range(parameters.get("rounds", 3)):
        u = [1 / n / sum(kernel[i][j] * v[j] for j in range(n)) for i in range(n)]
        v = [1 / n / sum(u[i] * kernel[i][j] for i in range(n)) for j in range(n)]
    plan = [[u[i] * kernel[i][j] * v[j] for j in range(n)] for i in range(n)]
    if parameters.get("importance") == "mass":
        return [sum(row) for row in plan]
    return [-sum(p * c for p, c in zip(plan[i], cost[i], strict=True)) / sum(plan[i]) for i in range(n)]


def slow_choice(scores: list[float], k: int, share: float) -> list[int]:
    n_even = round(share * k)
    first = best(scores, k - n_even)
    rest = [i for i in range(len(scores)) if i not in first]
    stretches = [[i for i in range(len(rest)) if i * n_even // len(rest) == j] for j in range(n_even)]
    return sorted([*first, *(rest[one[(len(one) - 1) // 2]] for one in stretches)])


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"feature": 0.3},
        {"relative": 0.0, "central": 0.3},
        {"sigma": 0.4, "epsilon": 0.5, "rounds": 1},
        {"importance": "mass", "epsilon": 0.3, "rounds": 1},
        {"recovered": 0.5, "central": 2.0},
    ],
    ids=str,
)
def test_formula(parameters: dict[str, Any]) -> None:
    method: Any = make_method("topv", parameters)
    for ratio in (0.05, 0.4, 1.0):
        signals = random_signals((4, 5), (2, 4), (1, 1), (1, 3), ratio=ratio, seed=2)
        # Any norm with weights of its own; the material's turns nothing.
        weight = torch.rand(signals.hidden.shape[1], generator=torch.Generator().manual_seed(9))
        signals = replace(signals, normed=lambda states=signals.hidden, weight=weight: states * weight)
        wanted = []
        for image in signals.images:
            scores = slow_scores(signals, image, parameters)
            at = signals.visual[image.tokens]
            got = method.scores(signals.hidden[at], signals.normed()[at], places_of(image))
            offset = torch.tensor(scores).double().mean() - got.double().mean()
            assert torch.allclose(got.double() + offset, torch.tensor(scores).double(), atol=1e-4, rtol=1e-4)
            wanted += [
                int(image.tokens[i]) for i in slow_choice(scores, image.budget, parameters.get("recovered", 0.1))
            ]
        assert method.select(signals).keep.tolist() == wanted


def places_of(image: Image) -> torch.Tensor:
    assert image.span.grid is not None
    rows, columns = image.span.grid
    return torch.tensor([[r / max(1, rows - 1), c / max(1, columns - 1)] for r in range(rows) for c in range(columns)])


def test_the_choice_of_every_size_and_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 14):
        image = random_signals((1, n)).images[0]
        score = torch.randint(3, (n,), generator=generator).float()
        for k in range(1, n + 1):
            for share in (0.0, 0.1, 0.5, 1.0):
                method: Any = make_method("topv", {"recovered": share})
                got = method.choose(score, replace(image, budget=k))
                assert got.tolist() == slow_choice(score.tolist(), k, share)


def test_many_blocks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from ivcp_eval.methods import topv

    signals = random_signals((9, 9), ratio=0.3, seed=4)
    whole = make_method("topv").select(signals).keep
    monkeypatch.setattr(topv, "block_rows", lambda n: 7)
    assert torch.equal(make_method("topv").select(signals).keep, whole)


def test_states_far_from_all_others() -> None:
    """A kernel that underflows everywhere else; and states that are all alike."""
    signals = random_signals((6, 6), ratio=0.5)
    at = signals.visual
    states = torch.eye(12)[torch.zeros(36, dtype=torch.long)] + 1e-4 * signals.hidden[at]
    method: Any = make_method("topv")
    states[7] = -states[7]
    score = method.scores(states, states, places_of(signals.images[0]))
    assert bool(score.isfinite().all())
    score = method.scores(torch.ones(36, 12), torch.ones(36, 12), places_of(signals.images[0]))
    assert bool(score.isfinite().all())


def test_layer() -> None:
    (cut,) = make_method("topv").cuts(ModelFacts("llava", 32), 0.5)
    assert (cut.layer, cut.cache) == (2, "from_cut")
    (cut,) = make_method("topv").cuts(ModelFacts("qwen3_vl", 32, first_cut=3), 0.5)
    assert cut.layer == 3


def test_bad_parameters() -> None:
    for name, value in (
        *(("feature", -1.0), ("relative", -1.0), ("central", math.inf), ("sigma", 0.0), ("epsilon", 0.0)),
        *(("sigma", math.inf), ("epsilon", math.inf), ("epsilon", math.nan), ("recovered", math.nan)),
        *(("recovered", 2.0), ("layer", -1), ("rounds", 0), ("importance", "peak")),
    ):
        with pytest.raises(ValueError, match=name):
            make_method("topv", {name: value})
