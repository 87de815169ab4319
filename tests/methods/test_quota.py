"""Oracle: the docstring's formulas with Python loops and floats."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ivcp_eval.interface import ModelFacts, Signals
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods.quota import layer_sensitivity
from tests.methods.material import GROUPS, HEADS, SIZE, best, random_signals

FACTS = ModelFacts("llava", n_layers=12)


def slow_rounded(values: list[float], bits: int) -> list[float]:
    most = 2 ** (bits - 1) - 1
    scale = max(abs(value) for value in values) / most
    return [round(value / scale) * scale for value in values]


def length(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def slow_attention(signals: Signals, bits: int) -> list[float]:
    """Of the last token for every token, mean over heads."""
    assert signals.project is not None
    assert signals.rotate is not None
    queries, keys = signals.rotate(signals.project("query")), signals.rotate(signals.project("key"))
    n = keys.shape[1]
    mean = [0.0] * n
    for head in range(HEADS):
        query = slow_rounded(queries[head, -1].tolist(), bits)
        group = head // (HEADS // GROUPS)
        logits = []
        for token in range(n):
            key = slow_rounded(keys[group, token].tolist(), bits)
            logits.append(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(SIZE))
        powers = [math.exp(logit) for logit in logits]
        mean = [m + power / sum(powers) / HEADS for m, power in zip(mean, powers, strict=True)]
    return mean


def slow_choice(signals: Signals, bits: int, weights: tuple[float, float, float]) -> list[int]:
    attention, kept = slow_attention(signals, bits), []
    for image in signals.images:
        tokens = image.tokens.tolist()
        parts: list[list[float]] = [[], [], []]
        for token in tokens:
            place = int(signals.visual[token])
            state = signals.hidden[place].tolist()
            low = slow_rounded(state, bits)
            parts[0].append(length(low))
            parts[1].append(attention[place])
            parts[2].append(length([a - b for a, b in zip(low, state, strict=True)]) / (length(state) + 1e-6))
        score = [0.0] * len(tokens)
        for part, weight in zip(parts, (weights[0], weights[1], -weights[2]), strict=True):
            spread = max(part) - min(part)
            score = [s + weight * (value - min(part)) / spread for s, value in zip(score, part, strict=True)]
        kept += [tokens[i] for i in best(score, image.budget)]
    return sorted(kept)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 1.0, -2.0), (0.0, 0.0, 1.0)])
def test_scores_are_those_of_rounded_states(bits: int, weights: tuple[float, float, float]) -> None:
    names = dict(zip(("magnitude", "attention", "risk"), weights, strict=True))
    method = make_method("quota", {"bits": bits, **names})
    for seed in range(3):
        signals = random_signals((4, 6), (3, 3), ratio=0.4, seed=seed)
        assert method.select(signals).keep.tolist() == slow_choice(signals, bits, weights)


def test_without_rounding_nothing_is_at_risk() -> None:
    """In 16 bits the choice is that of the very states and keys."""
    signals = random_signals((5, 5), ratio=0.4)
    fine = make_method("quota", {"bits": 16, "risk": 0.0}).select(signals).keep
    coarse = make_method("quota", {"bits": 2, "risk": 0.0}).select(signals).keep
    assert fine.tolist() == slow_choice(signals, 30, (1.0, 1.0, 0.0))
    assert fine.tolist() != coarse.tolist(), "low bits decide what is kept"


def _file(folder: Path, numbers: object) -> Path:
    path = folder / "layers.json"
    path.write_text(json.dumps(numbers))
    return path


def test_a_schedule_drops_most_where_layers_bear_it(tmp_path: Path) -> None:
    numbers = [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.4, 0.5, 0.6]
    low, high = np.quantile(numbers, [0.1, 0.9])
    expected = [min(1.0, max(0.0, (number - low) / (high - low))) for number in numbers]
    path = _file(tmp_path, numbers)
    assert layer_sensitivity(path, 12).tolist() == pytest.approx(expected, abs=1e-5)
    cuts = make_method("quota", {"sensitivity": path}).cuts(FACTS, 0.4)
    robust = [1 - sum(expected[a : a + 3]) / 3 for a in (3, 6, 9)]
    left = [1 - 0.6 * sum(robust[: n + 1]) / sum(robust) for n in range(3)]
    assert [cut.layer for cut in cuts] == [3, 6, 9]
    assert [cut.ratio for cut in cuts] == pytest.approx(left, abs=1e-5)
    assert cuts[-1].ratio == 0.4
    drops = -np.diff([1.0, *(cut.ratio for cut in cuts)])
    assert np.argmin(drops) == 1, "layers 6 to 8 are the most sensitive"


def test_layers_that_are_alike_share_alike_and_deaf_ones_are_no_cut(tmp_path: Path) -> None:
    for parameters in ({}, {"sensitivity": _file(tmp_path, [0.3] * 12)}):
        assert [cut.ratio for cut in make_method("quota", parameters).cuts(FACTS, 0.4)] == pytest.approx(
            [0.8, 0.6, 0.4]
        )
    path = _file(tmp_path, [0.0] * 6 + [1.0] * 6)
    assert [(cut.layer, cut.ratio) for cut in make_method("quota", {"sensitivity": path}).cuts(FACTS, 0.4)] == [
        (3, 0.4)
    ]
    path = _file(tmp_path, [0.0] * 3 + [1.0] * 9)
    assert len(make_method("quota", {"sensitivity": path}).cuts(FACTS, 0.4)) == 3, "all are as sensitive as can be"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"depths": (0.5, 0.5)}, "must be increasing"),
        ({"bits": 1}, "bits=1 must lie in 2..16"),
        ({"eta": 0}, "above 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(parameters: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_method("quota", parameters)


@pytest.mark.parametrize("numbers", [[0.1] * 11, [-1.0] * 12, {"a": 1}, ["x"] * 12])
def test_another_file_is_refused(tmp_path: Path, numbers: object) -> None:
    with pytest.raises(ValueError, match="must hold a JSON list of 12 numbers"):
        make_method("quota", {"sensitivity": _file(tmp_path, numbers)}).cuts(FACTS, 0.5)
