"""Decoder shapes of every family: from the configuration alone, and against what PyTorch counts in the real layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.interface.registry import adapter
from tests.engine import tiny_models

TOKENS = 7


@pytest.mark.parametrize("family", tiny_models.names())
def test_formula_is_what_pytorch_counts(family: str) -> None:
    model = copy.deepcopy(tiny_models.build(family, attn="eager")[0])
    # The grouped kernel of experts is one that PyTorch does not count.
    model.config.get_text_config()._experts_implementation = "eager"  # type: ignore[operator, union-attr]
    text = adapter(family).text_model(model)
    shape = DecoderShape.of(model.config)
    embeddings = torch.randn(1, TOKENS, shape.hidden, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        text(inputs_embeds=embeddings, use_cache=False)
    # PyTorch counts the masked half of the scores too; RoPE's outer product is not part of the formula.
    masked = TOKENS * (TOKENS - 1) // 2
    value_dim = shape.head_dim if shape.value_dim is None else shape.value_dim
    unmasked = 2 * masked * shape.heads * (shape.head_dim + value_dim) * shape.layers
    by_module = counter.get_flop_counts()
    rotary = sum(sum(found.values()) for module, found in by_module.items() if module.endswith("rotary_emb"))
    assert shape.prefill_flops([TOKENS] * shape.layers) + unmasked == counter.get_total_flops() - rotary


@pytest.mark.parametrize("family", tiny_models.names())
def test_facts_and_shape_without_weights(family: str, tmp_path: Path) -> None:
    model, _ = tiny_models.build(family)
    model.config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    wired = adapter(family)
    config = wired.config(str(tmp_path))
    assert wired.facts(config, family) == wired.facts(model.config, family)
    assert wired.facts(config, family).n_layers == len(wired.text_model(model).layers)
    assert DecoderShape.of(config) == DecoderShape.of(model.config)
