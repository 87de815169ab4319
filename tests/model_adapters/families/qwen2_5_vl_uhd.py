"""Tiny UHD-v4: the tiny Qwen2.5-VL with a compressor between its tower's two blocks, whose second is windowed."""

from __future__ import annotations

from typing import Any

from torch import nn

from model_adapters.qwen2_5_vl_uhd.modeling import UhdV4Config, UhdV4ForConditionalGeneration
from tests.engine.tiny_models import Rows
from tests.model_adapters.families import _qwen, qwen2_5_vl
from tests.model_adapters.families._qwen import END, N_TOKENS, PACES, START, STEPS, VIDEO
from tests.model_adapters.families._shared import IMAGE

SECOND_TURN_DROPS = qwen2_5_vl.SECOND_TURN_DROPS
APART = {2}

__all__ = ["END", "IMAGE", "N_TOKENS", "PACES", "SECOND_TURN_DROPS", "START", "STEPS", "VIDEO", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """That of `qwen2_5_vl`, with a third block in the tower."""
    stock = qwen2_5_vl.model(attn).config.to_dict()
    vision = stock["vision_config"] | {
        "model_type": "uhd_v4_vision",
        "depth": 3,
        "fullatt_block_indexes": [2],
        "spatial_merge_size": 4,
        "compress_after": 1,
    }
    config = UhdV4Config(**stock | {"model_type": "uhd_v4", "vision_config": vision})
    return UhdV4ForConditionalGeneration._from_config(config, attn_implementation=attn)


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """Patches of 14 x 14, 16 of them a visual token."""
    return _qwen.inputs(rows, seed, patch_size=14, paced=True, merge=4)
