"""Oracle: query-query attention, both rankings and the merge with Python loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ivcp_eval.engine.signals.vision import patch_signals
from ivcp_eval.interface import Image, PatchStates, Signals, TowerFacts
from ivcp_eval.interface.registry import make_method
from tests.methods.material import HEADS, random_signals


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def slow_image(signals: Signals, image: Image, by_text: float, words: str) -> dict[int, list[int]]:
    """Who stays, and whose mean each becomes."""
    tokens = image.tokens.tolist()
    states = [signals.hidden[int(signals.visual[t])].double() for t in tokens]
    query = signals.vision["query"][image.tokens].double()
    n = len(tokens)
    score = []
    for i in range(n):
        around = torch.zeros_like(states[0])
        seen = [j for j in range(n) if image.view is None or image.view[j] == image.view[i]]
        for head in range(HEADS):
            weight = [math.exp(float(query[i, head] @ query[j, head])) for j in seen]
            for j, w in zip(seen, weight, strict=True):
                around = around + w / sum(weight) * states[j] / HEADS
        text = [cosine(around, signals.hidden[q]) for q in signals.question.tolist()]
        score.append(sum(text) / len(text) if words == "mean" else max(text))
    attention = [float(signals.vision["received"][t]) for t in tokens]
    first = sorted(range(n), key=lambda i: (-score[i], i))[: round(by_text * image.budget)]
    rest = sorted((i for i in range(n) if i not in first), key=lambda i: (-attention[i], i))
    kept = sorted([*first, *rest[: image.budget - len(first)]])
    groups = {i: [i] for i in kept}
    for i in range(n):
        if i not in kept:
            groups[max(kept, key=lambda j: (cosine(states[i], states[j]), -j))].append(i)
    return {tokens[i]: [tokens[j] for j in members] for i, members in groups.items()}


def check(signals: Signals, parameters: dict[str, Any]) -> None:
    selection = make_method("desap", parameters).select(signals)
    selection.check(signals, "desap")
    assert selection.merge is not None
    wanted: dict[int, list[int]] = {}
    for image in signals.images:
        wanted |= slow_image(signals, image, parameters.get("by_text", 0.5), parameters.get("words", "mean"))
    assert selection.keep.tolist() == sorted(wanted)
    for token, row in zip(selection.keep.tolist(), selection.merge.to_dense(), strict=True):
        assert row.nonzero().flatten().tolist() == sorted(wanted[token])
        assert torch.allclose(row[row > 0], torch.tensor(1 / len(wanted[token])))


@pytest.mark.parametrize(
    "parameters", [{}, {"by_text": 0.0}, {"by_text": 1.0, "words": "max"}, {"by_text": 0.8}], ids=str
)
def test_formula(parameters: dict[str, Any]) -> None:
    for ratio in (0.05, 0.4, 1.0):
        check(random_signals((4, 6), (2, 4), (1, 1), ratio=ratio, seed=3), parameters)


def test_views_do_not_see_each_other() -> None:
    signals = random_signals((4, 6), ratio=0.4, seed=3)
    image = replace(signals.images[0], view=torch.arange(24) // 8)
    check(replace(signals, images=(image,)), {"by_text": 1.0})


def test_every_size_and_ties() -> None:
    """Equal queries everywhere: all text scores are the same; attention decides, and many of it are equal."""
    for n in range(1, 10):
        signals = random_signals((1, n), ratio=1.0, seed=n)
        generator = torch.Generator().manual_seed(n)
        hidden = torch.eye(12)[torch.randint(4, (len(signals.hidden),), generator=generator)]
        vision = {"received": torch.randint(3, (n,), generator=generator).float(), "query": torch.zeros(n, HEADS, 8)}
        for k in range(1, n + 1):
            image = replace(signals.images[0], budget=k)
            check(replace(signals, images=(image,), hidden=hidden, vision=vision), {"by_text": 0.0})
            tied = replace(signals, images=(image,), hidden=torch.ones_like(hidden), vision=vision)
            kept = make_method("desap", {"by_text": 1.0}).select(tied).keep.tolist()
            assert kept == list(range(k))


def test_queries_of_the_tower() -> None:
    """Scaled so that their inner products are logits."""
    query, key = (torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    got = patch_signals(PatchStates(query, key, (10,), 0.5), frozenset({"query"}))
    assert list(got) == ["query"]
    logits = torch.einsum("phd,qhd->hpq", got["query"], got["query"])
    assert torch.allclose(logits, 0.5 * query @ query.transpose(1, 2), atol=1e-5)


def test_block() -> None:
    facts = TowerFacts(n_blocks=32, own=31, whole=(7, 15, 23, 31), class_token=False)
    assert make_method("desap").tower_blocks(facts) == {"": 31}
    assert make_method("desap", {"depth": 0.5}).tower_blocks(facts) == {"": 23}


def test_bad_parameters() -> None:
    for name, value in (("by_text", 1.5), ("words", "sum"), ("depth", 1.0)):
        with pytest.raises(ValueError, match=name):
            make_method("desap", {name: value})
