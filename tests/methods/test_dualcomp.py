"""Oracle: clusters, edges and paths with Python loops over the grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ivcp_eval.interface import Image, Signals
from ivcp_eval.interface.ops import partition
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_signals
from tests.methods.test_sppruner import in_range

DEFAULTS: dict[str, Any] = {
    "geometric": 0.5, "clusters": 2.0, "large": 4, "relevant": 1.0, "regions": None, "scaled": False
}  # fmt: skip
Weights = dict[int, dict[int, float]]  # where a survivor stands -> what it is made of


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm())) if a.any() and b.any() else 0.0


def slow_clusters(states: list[torch.Tensor], columns: int, count: int) -> list[list[int]]:
    links = []
    for i in range(len(states)):
        row, column = divmod(i, columns)
        before = [
            (cosine(states[i], states[j]), -j)
            for j in range(i)
            if max(abs(j // columns - row), abs(j % columns - column)) == 1
        ]
        if before:
            likeness, j = max(before)
            links.append((-likeness, i, -j))
    group = list(range(len(states)))
    for _, i, j in sorted(sorted(links)[: len(states) - count], key=lambda link: link[1]):
        group[i] = group[j]  # the earlier token has its final group already
    return [[i for i in range(len(states)) if group[i] == g] for g in sorted(set(group))]


def slow_semantic(
    states: list[torch.Tensor], attention: list[float], columns: int, k: int, p: dict[str, Any]
) -> Weights:
    if not k:
        return {}
    found = slow_clusters(states, columns, min(len(states), max(k, round(p["clusters"] * k))))
    found = sorted(found, key=lambda members: (-sum(attention[i] for i in members), members[0]))[:k]
    out: Weights = {}
    for members in found:
        peak = max(members, key=lambda i: (attention[i], -i))
        total = sum(attention[i] for i in members)
        if len(members) < p["large"]:
            out[peak] = {peak: 1.0}
        else:
            out[peak] = {i: attention[i] / total if total else 1 / len(members) for i in members}
    return out


def slow_paths(
    states: list[torch.Tensor],
    relevance: list[float],
    grid: tuple[int, int],
    taken: set[int],
    k: int,
    p: dict[str, Any],
) -> list[int]:
    rows, columns = grid
    n = rows * columns
    edge = []
    for i in range(n):
        row, column = divmod(i, columns)
        around = [
            states[r * columns + c]
            for r in range(max(0, row - 1), min(rows, row + 2))
            for c in range(max(0, column - 1), min(columns, column + 2))
        ]
        edge.append(float((states[i] - torch.stack(around).mean(dim=0)).square().sum()))
    edge = in_range(edge)
    structure = [e * (1 + p["relevant"] * r) for e, r in zip(edge, relevance, strict=True)]
    count = min(n, p["regions"]) if p["regions"] else max(1, round(k * k / n))
    region, centre = partition(rows, columns, count)
    anchors: list[int] = []
    bands = sorted({int(c) // columns for c in centre})
    for number, band in enumerate(bands):
        inside = [g for g in range(len(centre)) if int(centre[g]) // columns == band]
        for g in reversed(inside) if number % 2 else inside:
            anchors.append(max((i for i in range(n) if region[i] == g), key=lambda i: (edge[i], -i)))
    path, here = [anchors[0]], anchors[0]
    for goal in anchors[1:]:
        while here != goal:
            row, column = divmod(here, columns)

            def far(i: int, goal: int = goal) -> int:
                return max(abs(i // columns - goal // columns), abs(i % columns - goal % columns))

            near = [
                i
                for i in range(n)
                if max(abs(i // columns - row), abs(i % columns - column)) == 1 and far(i) < far(here)
            ]
            here = max(near, key=lambda i: (structure[i], -i))
            path.append(here)
    order = sorted((i for i in range(n) if i not in taken), key=lambda i: (i not in path, -structure[i], i))
    return order[:k]


def slow_image(signals: Signals, image: Image, p: dict[str, Any]) -> Weights:
    grid = image.span.grid
    assert grid is not None
    states = [signals.hidden[int(signals.visual[t])].double() for t in image.tokens.tolist()]
    question = torch.stack([signals.hidden[q].double() for q in signals.question.tolist()]).mean(dim=0)
    attention = [float(signals.vision["received"][t]) for t in image.tokens.tolist()]
    relevance = in_range([cosine(x, question) for x in states])
    k = round(p["geometric"] * image.budget)
    out = slow_semantic(states, attention, grid[1], image.budget - k, p)
    paths = slow_paths(states, relevance, grid, set(out), k, p)
    if p["scaled"]:
        out = {i: {j: (1 - p["geometric"]) * w for j, w in made.items()} for i, made in out.items()}
    return out | {i: {i: p["geometric"] if p["scaled"] else 1.0} for i in paths}


def check(signals: Signals, parameters: dict[str, Any]) -> None:
    selection = make_method("dualcomp", parameters).select(signals)
    selection.check(signals, "dualcomp")
    assert selection.merge is not None
    dense = selection.merge.to_dense()
    wanted: Weights = {}
    for image in signals.images:
        own, first = slow_image(signals, image, DEFAULTS | parameters), int(image.tokens[0])
        wanted |= {first + i: {first + j: w for j, w in made.items()} for i, made in own.items()}
    assert selection.keep.tolist() == sorted(wanted)
    for row, token in zip(dense, selection.keep.tolist(), strict=True):
        expected = torch.zeros(signals.n_visual)
        for j, weight in wanted[token].items():
            expected[j] = weight
        assert torch.allclose(row, expected, atol=1e-5), token


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"geometric": 0.0, "large": 1},
        {"geometric": 1.0, "regions": 4},
        {"geometric": 0.7, "relevant": 3.0},
        {"clusters": 1.0, "large": 2, "scaled": True},
        {"clusters": 50.0, "regions": 100},
    ],
    ids=str,
)
def test_both_halves(parameters: dict[str, Any]) -> None:
    for ratio in (0.05, 0.3, 0.7, 1.0):
        check(random_signals((6, 7), (1, 9), (1, 1), (2, 1), ratio=ratio, seed=8), parameters)


def test_every_size_and_ties() -> None:
    """States along few axes: links, edges and structures are exact, and many are equal."""
    for n, grid in ((1, (1, 1)), (4, (2, 2)), (6, (1, 6)), (12, (3, 4))):
        signals = random_signals(grid, ratio=1.0, seed=n)
        generator = torch.Generator().manual_seed(n)
        hidden = torch.eye(12)[torch.randint(2, (len(signals.hidden),), generator=generator)] * 6
        hidden[signals.question] = torch.eye(12)[0]
        vision = {**signals.vision, "received": torch.randint(3, (n,), generator=generator).float()}
        for k in range(1, n + 1):
            image = replace(signals.images[0], budget=k)
            check(replace(signals, images=(image,), hidden=hidden, vision=vision), {"large": 2, "geometric": 0.0})
            check(replace(signals, images=(image,), hidden=hidden, vision=vision), {"large": 3, "clusters": 1.0})


def test_bad_parameters() -> None:
    for name, value in (
        *(("geometric", 1.5), ("clusters", 0.5), ("relevant", -1.0)),
        *(("large", 0), ("regions", 0)),
    ):
        with pytest.raises(ValueError, match=name):
            make_method("dualcomp", {name: value})
