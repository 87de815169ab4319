"""Tiny InternVL: tiles of 4 x 4 tokens (8 x 8 patches, shuffled), two tiles and a thumbnail or one tile, Qwen2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from tests.engine.tiny_models import Rows
from tests.model_adapters.families._shared import IMAGE, TEXT_CONFIG, prompts, without_images

TILES = (3, 1)  # of each kind of image, thumbnail included
N_TOKENS = tuple(16 * n for n in TILES)
START, END = 501, 502
PRUNE = {"tiles": (2, 1)}  # how the tiles lie is not among the model's inputs

__all__ = ["IMAGE", "N_TOKENS", "PRUNE", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """The stock class, small."""
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT_CONFIG},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [112, 112],
            "patch_size": [14, 14],
        },
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return without_images(InternVLForConditionalGeneration._from_config(config, attn_implementation=attn))


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """<img> contexts </img> for each image."""

    def draw(kind: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(TILES[kind], 3, 112, 112, generator=generator)

    made, pixels, _ = prompts(rows, seed, N_TOKENS, draw, before=[START], after=[END])
    return made | ({"pixel_values": torch.cat(pixels)} if pixels else {})
