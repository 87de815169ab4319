"""Oracle: sorting by attention and one farthest token at a time, then mean attention, with Python loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ivcp_eval.interface import Image, ModelFacts, Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import HEADS, best, random_signals


def slow_first(signals: Signals, image: Image, diverse: float, apart: str) -> list[int]:
    tokens = image.tokens.tolist()
    importance = [float(signals.vision["received"][t]) for t in tokens]
    states = [signals.hidden[int(signals.visual[t])].double() for t in tokens]

    def apart_by(i: int, j: int) -> float:
        return 1 - float(states[i] @ states[j] / (states[i].norm() * states[j].norm()))

    chosen = best(importance, image.budget - round(diverse * image.budget))
    near = list(chosen) if apart == "all" else []
    rest = [i for i in range(len(tokens)) if i not in chosen]
    while len(chosen) < image.budget:
        if near:
            distance = {i: min(apart_by(i, j) for j in near) for i in rest}
        else:  # the one whose nearest neighbour is farthest, as DivPrune begins
            distance = {i: min((apart_by(i, j) for j in rest if j != i), default=0.0) for i in rest}
        new = max(rest, key=lambda i: (distance[i], -i))
        chosen.append(new)
        near.append(new)
        rest.remove(new)
    return sorted(tokens[i] for i in chosen)


@pytest.mark.parametrize("diverse", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("apart", ["all", "themselves"])
def test_first_cut(diverse: float, apart: str) -> None:
    method = make_method("learnpruner", {"diverse": diverse, "apart": apart})
    for ratio in (0.05, 0.5, 1.0):
        signals = random_signals((4, 6), (3, 3), (1, 1), ratio=ratio, seed=3)
        wanted = [t for image in signals.images for t in slow_first(signals, image, diverse, apart)]
        assert method.select(signals).keep.tolist() == wanted


def test_every_size_and_ties() -> None:
    for n in range(1, 12):
        signals = random_signals((1, n), ratio=1.0, seed=n)
        generator = torch.Generator().manual_seed(n)
        hidden = torch.eye(12)[torch.randint(4, (len(signals.hidden),), generator=generator)]
        vision = {**signals.vision, "received": torch.randint(3, (n,), generator=generator).float()}
        for k in range(1, n + 1):
            image = replace(signals.images[0], budget=k)
            tied = replace(signals, images=(image,), hidden=hidden, vision=vision)
            kept = make_method("learnpruner", {"diverse": 0.4}).select(tied).keep.tolist()
            assert kept == slow_first(tied, image, 0.4, "all")


def test_second_cut() -> None:
    signals = random_signals((4, 5), (2, 3), ratio=0.3, seed=5, stage=1)
    rows = signals.attention(signals.question)
    wanted: list[int] = []
    for image in signals.images:
        scores = []
        for token in image.tokens.tolist():
            at = int(signals.visual[token])
            every = [float(rows[h, q, at]) for h in range(HEADS) for q in range(len(signals.question))]
            scores.append(sum(every) / len(every))
        wanted += [int(image.tokens[i]) for i in best(scores, image.budget)]
    assert make_method("learnpruner").select(signals).keep.tolist() == wanted


@pytest.mark.parametrize(
    ("layers", "ratio", "parameters", "wanted"),
    [
        (32, 1 / 9, {}, [(0, 1 / 3), (12, 1 / 9)]),
        (28, 0.5, {}, [(0, 1.0), (10, 0.5)]),
        (8, 0.2, {"first": 2.0, "depth": 0.75}, [(0, 0.4), (6, 0.2)]),
        (8, 0.2, {"depth": 0.0}, [(0, 0.6), (1, 0.2)]),
    ],
)
def test_cuts(layers: int, ratio: float, parameters: dict[str, Any], wanted: list[tuple[int, float]]) -> None:
    cuts = make_method("learnpruner", parameters).cuts(ModelFacts("llava", layers), ratio)
    assert [cut.layer for cut in cuts] == [layer for layer, _ in wanted]
    assert [cut.ratio for cut in cuts] == pytest.approx([share for _, share in wanted])


def test_bad_parameters() -> None:
    for name, value in (("first", 0.5), ("diverse", 1.5), ("depth", 1.0), ("apart", "none")):
        with pytest.raises(ValueError, match=name):
            make_method("learnpruner", {name: value})
