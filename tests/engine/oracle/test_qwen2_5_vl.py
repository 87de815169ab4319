"""``preset="official"`` on Qwen2.5-VL is the released code: the first image only, the skipped question token."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.engine.oracle.replay import ATTENTIONS, Case, cases, check


@functools.lru_cache
def load(folder: Path, attention: str) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("case", cases("qwen2_5_vl"))
def test_qwen2_5_vl(case: Case, attention: str) -> None:
    model = load(case.model_folder, attention)
    ids = case.array("input_ids")
    inputs = {
        "input_ids": ids,
        "attention_mask": case.array("attention_mask"),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "pixel_values": (case.array("pixel_a").int() @ case.array("pixel_b").int()).float() / 64,
        "image_grid_thw": case.array("image_grid_thw"),
    }
    check(case, model, inputs, ratio=case.facts["ratio"])
