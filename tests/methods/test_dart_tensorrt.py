"""Oracle: the reference selection of TensorRT Edge-LLM's unit tests, on lists of sequence positions."""

from __future__ import annotations

import numpy as np
import pytest

from ivcp_eval.interface import Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_signals


def _dart(signals: Signals, pivots: int = 4) -> list[int]:
    """TensorRT Edge-LLM's reference selection, on lists of sequence positions."""
    states = signals.hidden.double().numpy()
    l1, l2 = np.abs(states).sum(1), np.sqrt((states**2).sum(1))

    def best(places: list[int], score: dict[int, float], count: int) -> list[int]:
        return sorted(places, key=lambda place: (-score[place], place))[:count]

    text = best(signals.text.tolist(), dict(enumerate(l1)), pivots)
    kept = []
    for image in signals.images:
        span = signals.visual[image.tokens].tolist()
        chosen = best(span, dict(enumerate(l1)), min(pivots, image.budget))
        asked = chosen + text
        for number, pivot in enumerate(asked):
            remaining = image.budget - len(chosen)
            if remaining <= 0:
                break
            share = int(np.ceil(remaining / (len(asked) - number)))
            rest = [place for place in span if place not in chosen]
            unlike = {place: -float(states[pivot] @ states[place]) / max(l2[pivot] * l2[place], 1e-8) for place in rest}
            chosen = chosen + best(rest, unlike, share)
        kept += chosen
    first = {int(place): i for i, place in enumerate(signals.visual)}
    return sorted(first[place] for place in kept)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_dart_of_tensorrt_edge_llm(ratio: float) -> None:
    for seed in range(4):
        signals = random_signals((4, 6), (3, 5), ratio=ratio, seed=seed, question=7)
        assert make_method("dart_tensorrt").select(signals).keep.tolist() == _dart(signals)


def test_dart_with_fewer_tokens_than_pivots_keeps_the_largest() -> None:
    signals = random_signals((2, 4), ratio=0.25)
    norm = signals.hidden[signals.visual].abs().sum(1)
    assert make_method("dart_tensorrt").select(signals).keep.tolist() == sorted(norm.topk(2).indices.tolist())
