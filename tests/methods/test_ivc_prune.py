"""Oracle: Algorithm 1 with our budget rule, in Python loops, whole and with parts switched off for ablations.

The released code's rules (``preset="official"``) are held to recorded runs in tests/engine/oracle.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from ivcp_eval.interface import ModelFacts, Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import GROUPS, SIZE, best, random_signals

SIZES = ((0, 40, 20), (40, 12, 6))  # first token, tokens, budget of each image at ratio 0.5


def similarity(signals: Signals, queries: list[int], keys: list[int]) -> list[float]:
    """Mean over heads and queries of softmax over the keys of V_q V_k / sqrt(D)."""
    assert signals.value is not None
    total = [0.0] * len(keys)
    for group in range(GROUPS):
        value = signals.value[group].double()
        for q in queries:
            logits = [math.exp(float(value[q] @ value[k]) / math.sqrt(SIZE)) for k in keys]
            for i, weight in enumerate(logits):
                total[i] += weight / sum(logits) / GROUPS / len(queries)
    return total


def algorithm_1(signals: Signals, ivc: float = 0.1, ivc_share: float = 0.2, seeds: float = 0.01) -> list[int]:
    kept_all = []
    cos, sin = ([float(part[:, v].mean()) for v in signals.visual.tolist()] for part in signals.rope())
    for start, n, budget in SIZES:
        columns = signals.visual[start : start + n].tolist()
        each = min(round(ivc * n), round(ivc_share * budget))
        kept = set(best(cos[start : start + n], each)) | set(best(sin[start : start + n], each))
        question = signals.question.tolist()
        n_seeds = min(max(1, round(seeds * n)), budget - len(kept)) if seeds else 0
        chosen = best(similarity(signals, question, columns), n_seeds)
        kept |= set(chosen)
        refined = similarity(signals, question + [columns[i] for i in chosen], columns)
        order = sorted((i for i in range(n) if i not in kept), key=lambda i: (-refined[i], i))
        kept_all += sorted(start + i for i in [*kept, *order[: budget - len(kept)]])
    return kept_all


@pytest.mark.parametrize(
    "parameters",
    [{}, {"ivc": 0.0}, {"ivc": False}, {"seeds": 0.0}, {"seeds": 0.2}, {"ivc": 0.5, "ivc_share": 0.5}],
    ids=str,
)
def test_algorithm_and_ablations(parameters: dict[str, Any]) -> None:
    signals = random_signals((5, 8), (3, 4), ratio=0.5, seed=7)
    assert make_method("ivc_prune", parameters).select(signals).keep.tolist() == algorithm_1(signals, **parameters)


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (3, 5), (1, 7), (1, 1)])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.8])
def test_coordinates_never_overrun_the_budget(rows: int, columns: int, ratio: float) -> None:
    signals = random_signals((rows, columns), ratio=ratio, seed=1)
    selection = make_method("ivc_prune", {"ivc": 1.0, "ivc_share": 1.0}).select(signals)
    selection.check(signals, "ivc_prune")
    half = signals.budget // 2
    for part in signals.rope():
        assert set(best([float(part[:, v].mean()) for v in signals.visual.tolist()], half)) <= set(
            selection.keep.tolist()
        )


def test_without_foreground_the_rest_is_random() -> None:
    draws = [
        set(make_method("ivc_prune", {"foreground": False}).select(_same_but_seed(seed)).keep.tolist())
        for seed in range(6)
    ]
    cos, sin = (
        [float(part[:, v].mean()) for v in _same_but_seed(0).visual.tolist()] for part in _same_but_seed(0).rope()
    )
    always = set.intersection(*draws)
    for start, n, budget in SIZES:
        each = min(round(0.1 * n), round(0.2 * budget))
        for score in (cos, sin):
            assert {start + i for i in best(score[start : start + n], each)} <= always
    assert len({frozenset(draw) for draw in draws}) == 6


def _same_but_seed(seed: int) -> Signals:
    signals = random_signals((5, 8), (3, 4), ratio=0.5, seed=7)
    assert signals.generator is not None
    signals.generator.manual_seed(seed)
    return signals


@pytest.mark.parametrize("axis", range(3))
def test_one_axis_alone_chooses_otherwise(axis: int) -> None:
    """So the oracle above notices a general preset that reads one M-RoPE axis only."""
    signals = random_signals((5, 8), (3, 4), ratio=0.5, seed=7)
    one = replace(signals, rope=lambda: tuple(part[axis : axis + 1] for part in signals.rope()))
    assert make_method("ivc_prune").select(one).keep.tolist() != algorithm_1(signals)


def test_layer() -> None:
    assert make_method("ivc_prune", {"layer": 5}).cuts(ModelFacts("qwen2_5_vl", 28), 0.5)[0].layer == 5
    assert make_method("ivc_prune").cuts(ModelFacts("qwen2_5_vl", 28), 0.5)[0].layer == 16
    assert make_method("ivc_prune").cuts(ModelFacts("qwen2_5_vl", 36), 0.5)[0].layer == 22
