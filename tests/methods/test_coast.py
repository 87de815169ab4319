"""Oracle: equations 3 to 10 with Python loops, in double precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ivcp_eval.interface import Image, ModelFacts, Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import HEADS, random_signals


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def slow_image(signals: Signals, image: Image, parameters: dict[str, Any]) -> list[int]:
    tokens, n = image.tokens.tolist(), image.tokens.numel()
    at = {t: int(signals.visual[t]) for t in tokens}
    question, end = signals.question.tolist(), signals.hidden.shape[0] - 1
    saliency, last = {}, {}
    for t in tokens:
        found = []
        for q in question:
            per_head = [float(signals.attention(torch.tensor([q]))[h, 0, at[t]]) for h in range(HEADS)]
            found.append(max(per_head) if parameters.get("heads") == "max" else sum(per_head) / HEADS)
        saliency[t] = max(found)
        last[t] = sum(float(signals.attention(torch.tensor([end]))[h, 0, at[t]]) for h in range(HEADS)) / HEADS
    shares = [saliency[t] / sum(saliency.values()) for t in tokens]
    entropy = -sum(s * math.log(s) for s in shares) / math.log(n) if n > 1 else 0.0
    k = image.budget
    anchors = sorted(tokens, key=lambda t: (-last[t], t))[: max(1, int(parameters.get("anchors", 0.8) * k))]
    places = k - len(anchors)
    low, high = parameters.get("low", 0.05), parameters.get("high", 0.15)
    n_low = math.floor(places * (low + (high - low) * entropy))
    count = max(1, int(parameters.get("references", 0.1) * n))
    references = sorted(tokens, key=lambda t: (saliency[t], t))[:count]
    state = {t: signals.hidden[at[t]] for t in tokens}
    score = {
        t: max(cosine(state[t], state[a]) for a in anchors)
        - sum(cosine(state[t], state[r]) for r in references) / len(references)
        for t in tokens
        if t not in anchors
    }
    first = sorted(score, key=lambda t: (-score[t], t))[: places - n_low]
    rest = [t for t in score if t not in first]
    return sorted([*anchors, *first, *sorted(rest, key=lambda t: (score[t], t))[:n_low]])


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"anchors": 0.3},
        {"anchors": 0.0, "low": 0.5, "high": 1.0},
        {"anchors": 0.2, "low": 0.3, "high": 0.6, "heads": "max"},
        {"anchors": 0.5, "references": 0.6},
        {"anchors": 1.0, "references": 0.0},
    ],
    ids=str,
)
def test_formula(parameters: dict[str, Any]) -> None:
    for ratio in (0.02, 0.4, 0.8, 1.0):
        signals = random_signals((4, 5), (2, 4), (1, 1), ratio=ratio, seed=4)
        wanted = [t for image in signals.images for t in slow_image(signals, image, parameters)]
        assert make_method("coast", parameters).select(signals).keep.tolist() == wanted


def test_every_size_and_ties() -> None:
    """States along axes and attention in steps of 1/8: cosines and sums are exact, and many are equal."""
    for n in range(1, 14):
        signals = random_signals((1, n), ratio=1.0, seed=n)
        generator = torch.Generator().manual_seed(n)
        maps = torch.randint(1, 4, (HEADS, len(signals.hidden), len(signals.hidden)), generator=generator) / 8
        hidden = torch.eye(12)[torch.randint(3, (len(signals.hidden),), generator=generator)]
        for k in range(1, n + 1):
            image = replace(signals.images[0], budget=k)
            tied = replace(
                signals, images=(image,), hidden=hidden, attention=lambda rows, maps=maps, entering=False: maps[:, rows]
            )
            for parameters in ({}, {"anchors": 0.4, "low": 0.4, "high": 0.4}):
                kept = make_method("coast", parameters).select(tied).keep.tolist()
                assert kept == slow_image(tied, image, parameters)


def test_a_flat_question_keeps_more_of_what_is_unlike() -> None:
    signals = random_signals((10, 10), ratio=0.5, seed=1)
    method = make_method("coast", {"anchors": 0.2, "low": 0.0, "high": 1.0})
    flat, peaked = torch.ones(100), torch.full((100,), 1e-9)
    peaked[7] = 1.0
    states, last = signals.hidden[signals.visual], torch.arange(100.0)
    kept = [set(method.choose(s, last, states, signals.images[0]).tolist()) for s in (flat, peaked)]  # type: ignore[attr-defined]
    anchors = set(range(90, 100))
    assert anchors <= kept[0] & kept[1]
    assert kept[0] - anchors
    assert kept[0] != kept[1]


def test_the_ports_layers() -> None:
    assert [cut.layer for cut in make_method("coast").cuts(ModelFacts("llava", 32), 0.5)] == [2]
    assert [cut.layer for cut in make_method("coast").cuts(ModelFacts("qwen2_5_vl", 28), 0.5)] == [14]
    assert [cut.layer for cut in make_method("coast", {"layer": 5}).cuts(ModelFacts("llava", 32), 0.5)] == [5]


def test_bad_parameters() -> None:
    for name, value in (
        ("layer", 0),
        ("anchors", 1.1),
        ("low", -0.1),
        ("high", 2),
        ("references", 3),
        ("references", math.nan),
        ("heads", "sum"),
    ):
        with pytest.raises(ValueError, match=name):
            make_method("coast", {name: value})
