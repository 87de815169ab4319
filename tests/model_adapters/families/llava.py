"""Tiny LLaVA-1.5: CLIP of 4 x 4 patches, Llama with grouped heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.engine.tiny_models import Rows
from tests.model_adapters.families._shared import IMAGE, TEXT_CONFIG, clip_or_siglip, prompts, without_images

N_TOKENS = (16,)

__all__ = ["IMAGE", "N_TOKENS", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """The stock class, small."""
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT_CONFIG},
        vision_config=clip_or_siglip("clip_vision_model", 4) | {"projection_dim": 16, "vocab_size": 64},
        image_token_index=IMAGE,
        image_seq_length=N_TOKENS[0],
    )
    return without_images(LlavaForConditionalGeneration._from_config(config, attn_implementation=attn))


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """Images are bare runs of placeholders."""
    made, pixels, _ = prompts(rows, seed, N_TOKENS, lambda _, g: torch.randn(3, 56, 56, generator=g))
    return made | ({"pixel_values": torch.stack(pixels)} if pixels else {})
