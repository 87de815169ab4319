"""Tiny Qwen2-VL."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests.engine.tiny_models import Rows
from tests.model_adapters.families import _qwen
from tests.model_adapters.families._qwen import MROPE_TEXT_CONFIG, N_TOKENS, STEPS, TOKEN_IDS, VIDEO
from tests.model_adapters.families._shared import IMAGE, without_images

SECOND_TURN_DROPS = ("pixel_values", "pixel_values_videos")

__all__ = ["IMAGE", "N_TOKENS", "SECOND_TURN_DROPS", "STEPS", "VIDEO", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """The stock class, small."""
    config = Qwen2VLConfig(
        text_config=MROPE_TEXT_CONFIG,
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
        tie_word_embeddings=False,
        **TOKEN_IDS,
    )
    return without_images(Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attn))


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """Patches of 14 x 14."""
    return _qwen.inputs(rows, seed, patch_size=14)
