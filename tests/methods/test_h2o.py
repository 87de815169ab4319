"""Oracle: attention received, added up with Python loops over the maps that a stock model returns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ivcp_eval.engine.signals.source import attention_rows
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods import h2o
from tests.engine import tiny_models
from tests.methods.material import best, evicting_columns, image_columns, random_signals, stock_attention


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_in_a_model_every_head_keeps_its_heavy_hitters(family: str) -> None:
    inputs = tiny_models.make_inputs(family, "t5 i0 t9")
    columns, n = image_columns(family, inputs), inputs["input_ids"].shape[1]
    got = evicting_columns("h2o", family, inputs, 0.4)
    for layer, attention in enumerate(stock_attention(family, inputs)):
        per_group = attention.shape[1] // len(got[layer])
        for group, kept in enumerate(got[layer]):
            weights = []
            for column in columns:
                total = 0.0
                for head in range(group * per_group, (group + 1) * per_group):
                    for row in range(n):
                        total += float(attention[0, head, row, column])
                weights.append(total)
            assert kept == [columns[i] for i in best(weights, budget(0.4, len(columns)))], f"layer {layer}"


def test_a_few_rows_at_a_time_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = random_signals((5, 8), (3, 4), ratio=0.3)
    whole = signals.attention(torch.arange(signals.hidden.shape[0]))[:, :, signals.visual].sum(dim=1)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(h2o, "FEW", rows)
        monkeypatch.setattr(h2o, "MANY", rows)
        method = make_method("h2o")
        assert isinstance(method, h2o.Method)
        torch.testing.assert_close(method.weigh(signals), whole)


def test_no_key_is_compared_with_a_row_that_does_not_see_it() -> None:
    """Half of the products of queries and keys, in rows of which there are few at a time and few blocks."""
    from torch.utils.flop_counter import FlopCounterMode

    n, heads, size = 4096, 2, 4
    query, key = (torch.randn(heads, n, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    row = replace(
        random_signals((2, n // 2), lead=0, question=0),
        attention=lambda rows, entering=False: attention_rows(query, key, rows, 0.5),
        hidden=torch.zeros(n, 1),
    )
    method = make_method("h2o")
    assert isinstance(method, h2o.Method)
    with FlopCounterMode(display=False) as counter:
        received = method.weigh(row)
    assert float(received.sum()) == pytest.approx(heads * n, rel=1e-4)
    whole = 2 * heads * n * n * size
    assert whole / 2 <= counter.get_total_flops() < 0.52 * whole
