"""Tiny LLaVA-OneVision: SigLIP, the tiled view shrunk to at most three tiles' worth, Qwen2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from tests.engine.tiny_models import Rows
from tests.model_adapters.families._shared import IMAGE, TEXT_CONFIG, clip_or_siglip, prompts, without_images

# (height, width), tiles: overview 4; 4 x 4 patches are more than 1.1^2 times three tiles and become 3 x 3 (2 x 2 would
# be the means of the tiles, which all receive the same attention: which of equals stays is a matter of rounding).
SIZES = (((56, 28), 2), ((28, 56), 2), ((56, 56), 4))
N_TOKENS = (4 + 4 * 3, 4 + 2 * 5, 4 + 3 * 4)
SECOND_TURN_DROPS = ("pixel_values", "image_sizes")

__all__ = ["IMAGE", "N_TOKENS", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """The stock class, small."""
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT_CONFIG},
        vision_config=clip_or_siglip("siglip_vision_model", 2) | {"vision_use_head": False},
        image_token_index=IMAGE,
        video_token_index=504,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        vision_aspect_ratio="anyres_max_3",
    )
    return without_images(LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attn))


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """Every image tiled (no ``batch_num_images``)."""

    def draw(kind: int, generator: torch.Generator) -> torch.Tensor:
        tiles = torch.zeros(5, 3, 28, 28)
        tiles[: SIZES[kind][1] + 1] = torch.randn(SIZES[kind][1] + 1, 3, 28, 28, generator=generator)
        return tiles

    made, pixels, kinds = prompts(rows, seed, N_TOKENS, draw)
    if pixels:
        made |= {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor([SIZES[k][0] for k in kinds])}
    return made
