"""Tiny LLaVA-NeXT: an overview of 2 x 2 patches and up to four tiles, padding cut off, newline tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from tests.engine.tiny_models import Rows
from tests.model_adapters.families._shared import IMAGE, TEXT_CONFIG, clip_or_siglip, prompts, without_images

# (height, width), tiles: overview 4, then rows * (columns + 1). The last image keeps 2 of its 4 rows.
SIZES = (((56, 56), 4), ((28, 56), 2), ((56, 28), 2), ((30, 60), 2))
N_TOKENS = (4 + 4 * 5, 4 + 2 * 5, 4 + 4 * 3, 4 + 2 * 5)
SECOND_TURN_DROPS = ("pixel_values", "image_sizes")

__all__ = ["IMAGE", "N_TOKENS", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """The stock class, small."""
    config = LlavaNextConfig(
        text_config={"model_type": "llama", **TEXT_CONFIG},
        vision_config=clip_or_siglip("clip_vision_model", 2) | {"projection_dim": 16, "vocab_size": 64},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return without_images(LlavaNextForConditionalGeneration._from_config(config, attn_implementation=attn))


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """Tiles of all images padded to the most, as the processor does."""

    def draw(kind: int, generator: torch.Generator) -> torch.Tensor:
        tiles = torch.zeros(5, 3, 28, 28)
        tiles[: SIZES[kind][1] + 1] = torch.randn(SIZES[kind][1] + 1, 3, 28, 28, generator=generator)
        return tiles

    made, pixels, kinds = prompts(rows, seed, N_TOKENS, draw)
    if pixels:
        made |= {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor([SIZES[k][0] for k in kinds])}
    return made
