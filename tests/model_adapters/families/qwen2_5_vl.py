"""Tiny Qwen2.5-VL: 6 decoder layers, M-RoPE, a windowed vision tower with one full-attention block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.engine.tiny_models import VOCABULARY, Rows, draw_text, pad_left, row_generator

GRIDS = ((4, 6), (3, 5), (2, 2), (1, 1))  # rows, columns of visual tokens
N_TOKENS = tuple(rows * columns for rows, columns in GRIDS)
START, END, IMAGE, VIDEO = 501, 502, 503, 504


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
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attn)


def inputs(rows: Rows, seed: int) -> dict[str, Any]:
    """<|vision_start|> pads <|vision_end|> for each image; patches drawn per row."""
    ids, patches, grids = [], [], []
    for row in rows:
        generator = row_generator(row, seed)
        line: list[int] = []
        for kind, number in row:
            if kind == "text":
                line += draw_text(generator, number)
                continue
            height, width = GRIDS[number % len(GRIDS)]
            line += [START, *[IMAGE] * (height * width), END]
            patches.append(torch.randn(height * width * 4, 3 * 2 * 14 * 14, generator=generator))
            grids.append([1, height * 2, width * 2])
        ids.append(line)
    padded, mask = pad_left(ids)
    made: dict[str, Any] = {"input_ids": padded, "attention_mask": mask}
    made["mm_token_type_ids"] = (padded == IMAGE).int()
    if patches:
        made |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
    return made
