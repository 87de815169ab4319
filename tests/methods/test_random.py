"""Oracle: properties of a uniform draw without replacement, and of seeding."""

from __future__ import annotations

import torch

from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import pruned_columns, random_signals


def test_every_token_is_equally_likely() -> None:
    method, counts, draws = make_method("random"), torch.zeros(20), 600
    for seed in range(draws):
        counts[method.select(random_signals((4, 5), ratio=0.25, seed=seed)).keep] += 1
    expected = draws * 0.25
    chi_square = float(((counts - expected) ** 2 / (expected * 0.75)).sum())
    assert chi_square < 43.8  # 0.1 % of 19 degrees of freedom


def test_seeds_and_rows() -> None:
    _, make_inputs = tiny_models.build("qwen2_5_vl")
    both = make_inputs("t5 i0 t9", "t3 i0 t7")
    drawn = {seed: pruned_columns("random", "qwen2_5_vl", both, 0.5, seed=seed) for seed in (0, 1)}
    assert drawn[0] != drawn[1]
    alone = pruned_columns("random", "qwen2_5_vl", make_inputs("t5 i0 t9"), 0.5)
    assert drawn[0][0] == alone[0], "a row must draw the same in any batch"
    assert pruned_columns("random", "qwen2_5_vl", both, 0.5) == drawn[0]
