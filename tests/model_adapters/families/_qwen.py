"""Prompts of the tiny Qwen models: pre-cut patches and the grid of every image and video."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from tests.engine.tiny_models import Rows, draw_text
from tests.model_adapters.families._shared import IMAGE, TEXT_CONFIG, prompts

GRIDS = ((4, 6), (3, 5), (2, 2), (1, 1))  # rows, columns of visual tokens
N_TOKENS = tuple(rows * columns for rows, columns in GRIDS)
VIDEOS = ((3, 3, 5), (2, 2, 2))  # grid steps, rows, columns
STEPS = tuple((rows * columns,) * steps for steps, rows, columns in VIDEOS)
PACES = (0.75, 0.5)  # seconds of a step: short enough for text behind a video to have the highest position
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


def inputs(
    rows: Rows,
    seed: int,
    patch_size: int,
    stamped: bool = False,
    paced: bool = False,
    merge: int = 2,
    tokens: Callable[[int, int], int] = operator.mul,
) -> dict[str, Any]:
    """<|vision_start|> pads <|vision_end|> for each image and video.

    Args:
        stamped: whether text and markers stand around every grid step. paced: whether the inputs tell a step's length.
        merge: patches a side of a visual token. tokens: how many a prompt shows of so many rows and columns.
    """
    videos: list[tuple[int, torch.Tensor]] = []

    sizes = [tokens(*grid) for grid in GRIDS]

    def patches_of(n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(merge**2 * n, 3 * 2 * patch_size**2, generator=generator)

    def video(kind: int, generator: torch.Generator) -> list[int]:
        videos.append((kind, patches_of(sum(STEPS[kind]), generator)))
        steps = (tokens(*VIDEOS[kind][1:]),) * VIDEOS[kind][0]
        if not stamped:
            return [START, *[VIDEO] * sum(steps), END]
        return [token for n in steps for token in (*draw_text(generator, 2), START, *[VIDEO] * n, END)]

    made, patches, kinds = prompts(
        rows, seed, sizes, lambda kind, g: patches_of(N_TOKENS[kind], g), before=[START], after=[END], video=video
    )
    made["mm_token_type_ids"] = (made["input_ids"] == IMAGE).int() + 2 * (made["input_ids"] == VIDEO).int()
    if patches:
        grids = [[1, merge * GRIDS[k][0], merge * GRIDS[k][1]] for k in kinds]
        made |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
    if videos:
        grids = [[VIDEOS[k][0], merge * VIDEOS[k][1], merge * VIDEOS[k][2]] for k, _ in videos]
        made |= {"pixel_values_videos": torch.cat([v for _, v in videos]), "video_grid_thw": torch.tensor(grids)}
        if paced:
            made["second_per_grid_ts"] = torch.tensor([PACES[k] for k, _ in videos])
    return made
