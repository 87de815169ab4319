"""Tiny Qwen3-VL: DeepStack behind the first two decoder layers, interleaved M-RoPE, heads wider than E / H."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.engine.tiny_models import Rows
from tests.model_adapters.families import _qwen
from tests.model_adapters.families._qwen import N_TOKENS, STEPS, TOKEN_IDS, VIDEO
from tests.model_adapters.families._shared import IMAGE, TEXT_CONFIG, without_images

SECOND_TURN_DROPS = ("pixel_values", "pixel_values_videos")

__all__ = ["IMAGE", "N_TOKENS", "SECOND_TURN_DROPS", "STEPS", "VIDEO", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """The stock class, small."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=TEXT_CONFIG | {"head_dim": 24, "rope_parameters": rope},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=False,
        **TOKEN_IDS,
    )
    return without_images(Qwen3VLForConditionalGeneration._from_config(config, attn_implementation=attn))


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """Patches of 16 x 16; a time stamp of two tokens before every grid step."""
    return _qwen.inputs(rows, seed, patch_size=16, stamped=True)
