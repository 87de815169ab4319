"""Tiny Qwen2.5-VL: 6 decoder layers, M-RoPE, a windowed vision tower with one full-attention block."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.engine.tiny_models import VOCABULARY, Rows
from tests.model_adapters.families import _qwen
from tests.model_adapters.families._qwen import END, N_TOKENS, PACES, START, STEPS, TOKEN_IDS, VIDEO
from tests.model_adapters.families._shared import IMAGE

SECOND_TURN_DROPS = ("pixel_values", "pixel_values_videos")

__all__ = ["END", "IMAGE", "N_TOKENS", "PACES", "SECOND_TURN_DROPS", "START", "STEPS", "VIDEO", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """The stock class, small."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **TOKEN_IDS,
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attn)


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """Patches of 14 x 14; the inputs tell how long a grid step lasts."""
    return _qwen.inputs(rows, seed, patch_size=14, paced=True)
