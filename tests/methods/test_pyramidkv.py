"""Oracle: budgets by the released integer arithmetic, tokens by SnapKV's literal votes on a stock model's maps."""

from __future__ import annotations

import pytest

import ivcp_eval
from ivcp_eval.interface import ModelFacts
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import evicting_columns, image_columns, stock_attention
from tests.methods.test_snapkv import slow


def released_budgets(n_tokens: int, mean: int, n_layers: int, beta: int = 20) -> list[int]:
    """How many tokens each layer keeps of ``n_tokens``, whole numbers all the way."""
    if n_tokens < 2 * mean:
        return [mean] * n_layers
    least = mean // beta
    most = 2 * mean - least
    if most >= n_tokens:
        most, least = n_tokens, 2 * mean - n_tokens
    step = (most - least) // (n_layers - 1)
    return [most - layer * step for layer in range(n_layers)]


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.5, 0.75])
def test_budgets_are_the_released_ones_but_for_rounded_steps(ratio: float) -> None:
    n, layers = 100_000, 28
    cuts = make_method("pyramidkv").cuts(ModelFacts("qwen2_5_vl", layers), ratio)
    ours = [budget(cut.ratio, n) for cut in cuts]
    wanted = released_budgets(n, round(ratio * n), layers)
    assert all(abs(a - b) <= layers for a, b in zip(ours, wanted, strict=True))
    assert sum(ours) == pytest.approx(ratio * n * layers, rel=1e-4)
    assert (len(set(ours)) == 1) == (ratio > 0.5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_in_a_model_each_layer_keeps_its_share_of_votes(family: str) -> None:
    model, make_inputs = tiny_models.build(family)
    inputs = make_inputs("t5 i0 t9")
    columns = image_columns(family, inputs)
    question = list(range(columns[-1] + 1 + (family == "qwen2_5_vl"), inputs["input_ids"].shape[1]))
    got = evicting_columns("pyramidkv", family, inputs, 0.4)
    cuts = make_method("pyramidkv").cuts(ModelFacts(family, len(got)), 0.4)
    for layer, attention in enumerate(stock_attention(family, inputs)):
        share = cuts[layer].ratio
        assert got[layer] == slow(attention[0], [columns], question, share, len(got[layer]), 8, 7, "max"), layer
    counts = [len(heads[0]) for heads in got]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3 * counts[-1]
    with ivcp_eval.prune(model, "pyramidkv", 0.4) as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert [layer[0] for layer in run.visual_cached] == counts
    assert [length - counts[i] for i, length in enumerate(run.kv_lengths)] == [run.kv_lengths[0] - counts[0]] * len(got)
    assert run.cache_ratio == pytest.approx(0.4, abs=0.02)


def test_a_head_standing_pyramid_is_refused() -> None:
    with pytest.raises(ValueError, match="beta"):
        make_method("pyramidkv", {"beta": 0.5})
