"""Oracle: the product of two scores and regions that grow, with Python loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ivcp_eval.interface import Image, Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_signals


def in_range(scores: list[float]) -> list[float]:
    low, high = min(scores), max(scores)
    return [(score - low) / (high - low) if high > low else 0.0 for score in scores]


def slow_image(signals: Signals, image: Image, focus: float, rounds: int, power: float) -> list[int]:
    assert image.span.grid is not None
    _, columns = image.span.grid
    tokens, n = image.tokens.tolist(), image.tokens.numel()
    question = torch.stack([signals.hidden[q].double() for q in signals.question.tolist()]).mean(dim=0)
    states = [signals.hidden[int(signals.visual[t])].double() for t in tokens]
    relevance = in_range([float(x @ question / (x.norm() * question.norm())) for x in states])
    saliency = in_range([float(signals.vision["received"][t]) for t in tokens])
    score = [s * r**power for s, r in zip(saliency, relevance, strict=True)]

    def take(candidates: list[int], k: int) -> list[int]:
        return sorted(candidates, key=lambda i: (-score[i], i))[:k]

    k = image.budget
    first = max(1, round(focus * k))
    chosen = take(list(range(n)), first)
    for done in range(1, rounds + 1):
        here = [divmod(i, columns) for i in chosen]
        ring = [
            i
            for i in range(n)
            if i not in chosen
            and any(max(abs(i // columns - r), abs(i % columns - c)) == 1 for r, c in here)
        ]  # fmt: skip
        # So many of the context's tokens are due by the end of this round.
        due = (k - first) - (k - first) * (rounds - done) // rounds
        chosen += take(ring, first + due - len(chosen))
    chosen += take([i for i in range(n) if i not in chosen], k - len(chosen))
    return sorted(tokens[i] for i in chosen)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"focus": 0.1, "rounds": 1}, {"focus": 0.0, "rounds": 9}, {"rounds": 0}, {"relevant": 0.0}],
    ids=str,
)
def test_regions(parameters: dict[str, Any]) -> None:
    settings = {"focus": 0.5, "rounds": 4, "relevant": 1.0} | parameters
    for ratio in (0.05, 0.3, 0.8, 1.0):
        signals = random_signals((6, 7), (1, 9), (1, 1), ratio=ratio, seed=6)
        wanted = [t for image in signals.images for t in slow_image(signals, image, *settings.values())]
        assert make_method("sppruner", parameters).select(signals).keep.tolist() == wanted


def test_every_size_and_ties() -> None:
    for n, grid in ((1, (1, 1)), (5, (1, 5)), (12, (3, 4))):
        signals = random_signals(grid, ratio=1.0, seed=n)
        generator = torch.Generator().manual_seed(n)
        hidden = torch.eye(12)[torch.randint(2, (len(signals.hidden),), generator=generator)]
        vision = {**signals.vision, "received": torch.randint(3, (n,), generator=generator).float()}
        for k in range(1, n + 1):
            image = replace(signals.images[0], budget=k)
            tied = replace(signals, images=(image,), hidden=hidden, vision=vision)
            assert make_method("sppruner").select(tied).keep.tolist() == slow_image(tied, image, 0.5, 4, 1.0)


def test_context_touches_the_focus() -> None:
    """One bright token among dark ones: its neighbours stay with it, not the next brightest far away."""
    signals = random_signals((9, 9), ratio=9 / 81)
    saliency = torch.linspace(0, 0.1, 81)
    saliency[20] = 1.0
    hidden = torch.ones_like(signals.hidden)
    signals = replace(signals, hidden=hidden, vision={"received": saliency})
    kept = make_method("sppruner", {"focus": 0.1, "rounds": 1, "relevant": 0.0}).select(signals).keep.tolist()
    assert kept == [10, 11, 12, 19, 20, 21, 28, 29, 30]


def test_bad_parameters() -> None:
    for name, value in (("focus", 1.5), ("rounds", -1), ("relevant", -0.5)):
        with pytest.raises(ValueError, match=name):
            make_method("sppruner", {name: value})
