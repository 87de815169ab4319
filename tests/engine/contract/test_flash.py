"""The flash branch of stock transformers, on a CPU, gives what sdpa gives."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engine import tiny_models
from tests.engine.contract import flash_stand_in
from tests.engine.contract.cases import RAGGED, SINGLE, Case
from tests.engine.contract.checks import same_generation

METHODS = ("none", "ivc_prune", "toy_stages_mixed", "toy_at_input", "toy_renumber_once", "toy_merge")


@pytest.mark.parametrize("family", tiny_models.names())
def test_flash_equals_sdpa(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = flash_stand_in.install(monkeypatch)
    model = copy.deepcopy(Case(family, "none").model)
    text_model = tiny_models.text_model(family, model)
    text_model.config._attn_implementation = "flash_attention_2"  # the vision tower keeps sdpa
    masks = []
    layers = [text_model.layers[0], text_model.layers[-1]]
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _m, _a, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )
    for method in METHODS:
        case = Case(family, method)
        for layouts in (SINGLE, RAGGED):
            inputs = case.inputs(*layouts)
            outputs, kept = [], []
            for this in (model, case.model):
                with case.prune(this) as recording:
                    first = case.generate(inputs, 3, model=this)
                    ids = torch.cat([first.sequences, torch.arange(20, 24).repeat(len(layouts), 1)], dim=1)
                    turn = tiny_models.second_turn(family, inputs, ids)
                    second = case.generate(turn, 2, model=this, past_key_values=first.past_key_values)
                outputs.append((first, second))
                kept.append([row.tolist() for row in recording.run.kept])
            assert kept[0] == kept[1]
            for turn_number in (0, 1):
                same_generation(outputs[0][turn_number], outputs[1][turn_number], f"{case}, turn {turn_number + 1}")
    assert set(calls) == {"flash_attn_func", "flash_attn_varlen_func"}, "the flash branch did not run"
    assert any(mask is not None for mask in masks)
    assert all(mask is None or mask.ndim == 2 for mask in masks), "flash attention takes 2-D masks"
