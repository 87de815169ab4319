"""Oracle: the compact form itself: kept channels stored, queries cut to the same, with Python loops."""

from __future__ import annotations

import pytest
import torch

import ivcp_eval
from ivcp_eval.interface import CachedKeys
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import best


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 4), (0.5, 8), (0.7, 12), (0.01, 1)])
def test_logits_equal_those_of_the_compact_form(ratio: float, kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 40, 16, generator=generator) * torch.linspace(0.5, 2, 16)
    query = torch.randn(6, 32, 16, generator=generator) * torch.linspace(2, 0.5, 16).roll(3)
    edited = make_method("think").edit_keys(CachedKeys(0, key, query, ratio))
    later = torch.randn(16, generator=generator)
    chosen = []
    for head in range(2):
        weights = []
        for channel in range(16):
            heat = 0.0
            for member in range(3 * head, 3 * head + 3):
                heat += sum(float(query[member, token, channel]) ** 2 for token in range(32)) / 32 / 3
            weights.append(heat * sum(float(key[head, token, channel]) ** 2 for token in range(40)) / 40)
        stays = best(weights, kept)
        chosen.append(stays)
        compact = [[float(key[head, token, channel]) for channel in stays] for token in range(40)]
        for token, row in enumerate(compact):
            wanted = sum(float(later[channel]) * value for channel, value in zip(stays, row, strict=True))
            assert float(later @ edited[head, token]) == pytest.approx(wanted, abs=1e-4)
        assert int((edited[head] != 0).any(dim=0).sum()) == kept
    assert ratio < 0.1 or chosen[0] != chosen[1]


def test_every_token_stays_and_the_saving_is_analytic() -> None:
    model, make_inputs = tiny_models.build("llava")
    with ivcp_eval.prune(model, "think", 0.25) as run:
        model.generate(**make_inputs("t5 i0 t9"), max_new_tokens=3, do_sample=False)
    assert run.cache_ratio == run.kept_ratio == 1
    assert run.analytic_share(0, 2) == pytest.approx((1 + 0.25) / 2)
