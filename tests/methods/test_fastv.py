"""Oracle: the formula on given attention maps, and transformers' own eager attention maps of the unpruned model."""

from __future__ import annotations

import pytest

from ivcp_eval.interface import ModelFacts
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import best, image_columns, pruned_columns, random_signals, stock_attention


def test_formula() -> None:
    signals = random_signals((3, 5), (2, 4), ratio=0.4)
    rows = signals.attention([-1])[:, 0].tolist()  # (heads, n)
    scores = [sum(head[c] for head in rows) / len(rows) for c in signals.visual.tolist()]
    wanted = best(scores[:15], 6) + [15 + i for i in best(scores[15:], 3)]
    assert make_method("fastv").select(signals).keep.tolist() == wanted


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_against_stock_attention_maps(family: str, layer: int) -> None:
    inputs = tiny_models.make_inputs(family, "t5 i0 t9")
    visual = image_columns(family, inputs)
    scores = stock_attention(family, inputs)[layer - 1][0, :, -1].mean(0)[visual].tolist()
    kept = {visual[i] for i in best(scores, len(visual) // 2)}
    wanted = [c for c in range(inputs["input_ids"].shape[1]) if c not in visual or c in kept]
    assert pruned_columns("fastv", family, inputs, 0.5, layer=layer) == [wanted]


def test_earlier_caches_stay_whole() -> None:
    (cut,) = make_method("fastv").cuts(ModelFacts("llava", 32), 0.5)
    assert (cut.layer, cut.cache, cut.renumber) == (2, "from_cut", False)
    with pytest.raises(ValueError, match="no layer before it"):
        make_method("fastv", {"layer": 0})
