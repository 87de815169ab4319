"""Oracle: sparsity, budgets and scores with Python loops over the maps that a stock model returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ivcp_eval
from ivcp_eval.interface import ModelFacts
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods import vlcache
from tests.engine import tiny_models
from tests.methods.material import best, evicting_columns, image_columns, random_signals, stock_attention


def slow_density(maps: torch.Tensor, question: list[int], threshold: float) -> float:
    """1 - gamma of one layer: ``maps`` (H, n, n)."""
    per_head = []
    for head in range(len(maps)):
        strong = entries = 0
        for row in question:
            largest = max(float(maps[head, row, column]) for column in range(row + 1))
            strong += sum(float(maps[head, row, column]) >= threshold * largest for column in range(row + 1))
            entries += row + 1
        per_head.append(strong / entries)
    return sum(per_head) / len(per_head)


@pytest.mark.parametrize(("family", "ratio", "threshold"), [("qwen2_5_vl", 0.4, 0.5), ("llava", 0.1, 0.3)])
@pytest.mark.parametrize("rows", [2, vlcache.ROWS])
def test_in_a_model_dense_layers_keep_more(
    family: str, ratio: float, threshold: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlcache, "ROWS", rows)
    inputs = tiny_models.make_inputs(family, "t5 i0 t9")
    columns = image_columns(family, inputs)
    question = list(range(columns[-1] + 1 + (family == "qwen2_5_vl"), inputs["input_ids"].shape[1]))
    maps = [layer[0] for layer in stock_attention(family, inputs)]
    density = [slow_density(layer, question, threshold) for layer in maps]
    shares = [min(1.0, max(0.01, ratio * len(maps) * own / sum(density))) for own in density]
    got = evicting_columns("vlcache", family, inputs, ratio, threshold=threshold)
    for layer, attention in enumerate(maps):
        per_group = len(attention) // len(got[layer])
        for group, kept in enumerate(got[layer]):
            heads = range(group * per_group, (group + 1) * per_group)
            weights = [sum(float(attention[h, row, column]) for h in heads for row in question) for column in columns]
            count = max(1, round(shares[layer] * len(columns)))
            assert kept == [columns[i] for i in best(weights, count)], f"layer {layer}"
    assert len({len(layer[0]) for layer in got}) > 1, "no layer differs: the test would pass without budgets"


def test_memory_is_freed_as_much_as_the_layers_say() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with ivcp_eval.prune(model, "vlcache", 0.3, threshold=0.5) as run:
        model.generate(**make_inputs("t5 i0 t9", "t4 i1 t3 i2 t6"), max_new_tokens=2, do_sample=False)
    assert run.kept_ratio == run.layer_mean_ratio == 1
    assert run.cache_ratio == pytest.approx(0.3, abs=0.05)
    assert len({tuple(layer) for layer in run.visual_cached}) > 1
    lengths = {length - max(layer) for length, layer in zip(run.kv_lengths, run.visual_cached, strict=True)}
    assert len(lengths) <= 2, "a layer's cache has another length than what it kept"


def test_clipped_shares() -> None:
    method = make_method("vlcache", {"heads": "shared"})
    signals = random_signals((10, 10), ratio=0.5)
    counts = []
    strong = [torch.tensor(value) for value in (1000, 999, 1)]
    signals.memory |= {"strong": strong, "weight": [torch.rand(4, 100)] * 3, "groups": 1}
    for stage, cut in enumerate(method.cuts(ModelFacts("llava", 3), 0.9)):
        assert cut.late
        counts.append(method.select(replace(signals, stage=stage, cut=cut)).keep.numel())
    assert counts == [100, 100, 1]


def test_states_are_gone_when_a_late_eviction_is_chosen() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    method = make_method("vlcache")
    object.__setattr__(method, "select", lambda signals: signals.attention(signals.question))
    with pytest.raises(ValueError, match="keep what it needs in `observe`"), ivcp_eval.prune(model, method, 0.5):
        model(**make_inputs("t5 i0 t9"))


@pytest.mark.parametrize("parameters", [{"threshold": 0.0}, {"threshold": 1.5}, {"heads": "each"}])
def test_refused_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        make_method("vlcache", parameters)
