"""``preset="official"`` on LLaVA-1.5 is the released code, layer 0's whole cache and the misplaced span included."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.engine.oracle.replay import ATTENTIONS, Case, cases, check


@functools.lru_cache
def load(folder: Path, attention: str) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("case", cases("llava"))
def test_llava(case: Case, attention: str) -> None:
    pixels = (case.array("pixel_a").int() @ case.array("pixel_b").int()).float() / 64
    inputs = {key: case.array(key) for key in ("input_ids", "attention_mask")} | {"pixel_values": pixels[None]}
    configured, true = case.facts["image_start_configured"], case.facts["image_start_true"]
    layout = {} if configured == true else {"image_mask": case.span(configured)}
    check(case, load(case.model_folder, attention), inputs, **layout)
