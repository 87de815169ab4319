"""Tiny DeepSeek-VL2 as small is: latent attention, experts; views of 3 x 3 patches become 2 x 2 tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model_adapters.deepseek_vl2.configuration import DeepseekVL2Config
from model_adapters.deepseek_vl2.layout import n_tokens
from model_adapters.deepseek_vl2.modeling import IMAGE_INPUTS, DeepseekVL2ForConditionalGeneration
from tests.engine.tiny_models import Rows
from tests.model_adapters.families._shared import IMAGE, TEXT_CONFIG, clip_or_siglip, prompts

TILES = ((1, 2), (2, 1), (1, 1))  # (w, h); the thumbnail and its newlines come on top
N_TOKENS = tuple(n_tokens(2, tiles) for tiles in TILES)
SECOND_TURN_DROPS = IMAGE_INPUTS

__all__ = ["IMAGE", "N_TOKENS", "SECOND_TURN_DROPS", "inputs", "model"]


def model(attn: str) -> nn.Module:
    """Our class, small."""
    language = {
        **TEXT_CONFIG,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    }
    config = DeepseekVL2Config(
        language_config=language,
        vision_config={**clip_or_siglip("siglip_vision_model", 3), "vision_use_head": False},
        projector_config={"input_dim": 32, "n_embed": 64},
        image_token_id=IMAGE,
    )
    made = DeepseekVL2ForConditionalGeneration._from_config(config, attn_implementation=attn)
    # A cache-less second turn may not hold a placeholder that no image fills.
    made.generation_config.suppress_tokens = [IMAGE]
    model: nn.Module = made
    return model


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """Placeholders of every view, newline and separator; views padded to the row with most."""

    def draw(kind: int, generator: torch.Generator) -> torch.Tensor:
        width, height = TILES[kind]
        return torch.randn(1 + width * height, 3, 42, 42, generator=generator)

    made, pixels, kinds = prompts(rows, seed, N_TOKENS, draw)
    if not pixels:
        return made
    counts = [sum(segment == "image" for segment, _ in row) for row in rows]
    images, tiles = iter(pixels), iter(TILES[kind] for kind in kinds)
    views = [torch.cat([torch.zeros(0, 3, 42, 42), *(next(images) for _ in range(n))]) for n in counts]
    crops = [[*(next(tiles) for _ in range(n)), *[(0, 0)] * (max(counts) - n)] for n in counts]
    most = max(row.shape[0] for row in views)
    padded = [torch.cat((row, row.new_zeros(most - row.shape[0], 3, 42, 42))) for row in views]
    sizes = [[(60, 40) if w else (0, 0) for w, _ in row] for row in crops]
    return made | {
        "pixel_values": torch.stack(padded),
        "images_spatial_crop": torch.tensor(crops),
        "image_sizes": torch.tensor(sizes),
    }
