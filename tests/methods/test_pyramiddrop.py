"""Oracle: the published schedule, the formula on given maps, and transformers' own maps for a stage.

That later stages see the states of what survived earlier ones is in the contract (tests/engine/contract).
"""

from __future__ import annotations

import pytest

from ivcp_eval.interface import ModelFacts
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import best, image_columns, pruned_columns, random_signals, stock_attention


def test_published_schedule() -> None:
    cuts = make_method("pyramiddrop").cuts(ModelFacts("llava", 32), 0.125)
    assert [cut.layer for cut in cuts] == [8, 16, 24]
    assert [cut.ratio for cut in cuts] == pytest.approx([0.5, 0.25, 0.125])
    assert {cut.cache for cut in cuts} == {"from_cut"}
    assert all(cut.renumber for cut in cuts)
    shallow = make_method("pyramiddrop").cuts(ModelFacts("llava", 2), 0.25)
    assert [cut.ratio for cut in shallow][-1] == pytest.approx(0.25)


def test_formula_uses_the_layer_that_is_entered() -> None:
    signals = random_signals((3, 5), ratio=0.4)
    rows = signals.attention([-1], entering=True)[:, 0].tolist()
    scores = [sum(head[c] for head in rows) / len(rows) for c in signals.visual.tolist()]
    assert make_method("pyramiddrop").select(signals).keep.tolist() == best(scores, 6)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_stage_against_stock_attention_maps(family: str) -> None:
    inputs = tiny_models.make_inputs(family, "t5 i0 t9")
    visual = image_columns(family, inputs)
    for depth, layer in ((1 / 6, 1), (0.5, 3)):
        scores = stock_attention(family, inputs)[layer][0, :, -1].mean(0)[visual].tolist()
        kept = {visual[i] for i in best(scores, len(visual) // 2)}
        wanted = [c for c in range(inputs["input_ids"].shape[1]) if c not in visual or c in kept]
        assert pruned_columns("pyramiddrop", family, inputs, 0.5, depths=(depth,)) == [wanted]


def test_bad_depths() -> None:
    for depths in ((), (0.5, 0.25), (0.5, 1.0), (-0.1,)):
        with pytest.raises(ValueError, match="depths"):
            make_method("pyramiddrop", {"depths": depths})
