"""``preset="official"`` on DeepSeek-VL2's language model alone is the released code."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.oracle.replay import ATTENTIONS, Case, cases, check


@functools.lru_cache
def load(folder: Path, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("case", cases("deepseek_vl2"))
def test_deepseek_vl2(case: Case, attention: str) -> None:
    model = load(case.model_folder, attention)
    image = case.image_embeddings()
    image[case.array("newline_slots")] = (torch.arange(image.shape[1]) % 7 - 3) / 4
    layout = {"tiles": case.facts["tiles_wh"], "padding": case.array("padding_token_positions")}
    inputs = case.prompt_embeddings(model, image)
    check(case, model, inputs, image_mask=case.span(case.facts["image_start"]), **layout)
