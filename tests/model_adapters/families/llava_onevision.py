"""Tiny LLaVA-OneVision: SigLIP of 3 x 3 patches, the tiled view shrunk to at most two tiles' worth, Qwen2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from tests.engine.tiny_models import Rows
from tests.model_adapters.families._shared import IMAGE, TEXT_CONFIG, clip_or_siglip, prompts, without_images

# (height, width), tiles: overview 9; 6 x 6 patches are more than 1.1^2 times two tiles and become 4 x 4.
SIZES = (((84, 42), 2), ((42, 84), 2), ((84, 84), 4))
N_TOKENS = (9 + 6 * 4, 9 + 3 * 7, 9 + 4 * 5)
STEPS = ((4, 4, 5),) * 2  # frames pooled to 2 x 2, a newline behind the last; videos of a batch have equally many
SECOND_TURN_DROPS = ("pixel_values", "image_sizes", "pixel_values_videos")
VIDEO = 504

__all__ = ["IMAGE", "N_TOKENS", "STEPS", "VIDEO", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """The stock class, small."""
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT_CONFIG},
        vision_config=clip_or_siglip("siglip_vision_model", 3) | {"vision_use_head": False},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[42, 84], [84, 42], [84, 84]],
        vision_aspect_ratio="anyres_max_2",
    )
    return without_images(LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attn))


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """Every image tiled (no ``batch_num_images``)."""
    videos: list[torch.Tensor] = []

    def draw(kind: int, generator: torch.Generator) -> torch.Tensor:
        tiles = torch.zeros(5, 3, 42, 42)
        tiles[: SIZES[kind][1] + 1] = torch.randn(SIZES[kind][1] + 1, 3, 42, 42, generator=generator)
        return tiles

    def video(kind: int, generator: torch.Generator) -> list[int]:
        videos.append(torch.randn(len(STEPS[kind]), 3, 42, 42, generator=generator))
        return [VIDEO] * sum(STEPS[kind])

    made, pixels, kinds = prompts(rows, seed, N_TOKENS, draw, video=video)
    if videos:
        made["pixel_values_videos"] = torch.stack(videos)
    if pixels:
        made |= {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor([SIZES[k][0] for k in kinds])}
    return made
