"""Prompts of the tiny Qwen models: pre-cut patches and the grid of every image."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.tiny_models import Rows
from tests.model_adapters.families._shared import IMAGE, TEXT_CONFIG, prompts

GRIDS = ((4, 6), (3, 5), (2, 2), (1, 1))  # rows, columns of visual tokens
N_TOKENS = tuple(rows * columns for rows, columns in GRIDS)
START, END, VIDEO = 501, 502, 504

MROPE_TEXT_CONFIG = TEXT_CONFIG | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
}
TOKEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def inputs(rows: Rows, seed: int, patch_size: int) -> dict[str, Any]:
    """<|vision_start|> pads <|vision_end|> for each image."""

    def draw(kind: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(4 * N_TOKENS[kind], 3 * 2 * patch_size**2, generator=generator)

    made, patches, kinds = prompts(rows, seed, N_TOKENS, draw, before=[START], after=[END])
    made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).int()
    if patches:
        grids = [[1, 2 * GRIDS[k][0], 2 * GRIDS[k][1]] for k in kinds]
        made |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
    return made
