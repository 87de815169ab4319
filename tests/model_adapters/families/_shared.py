"""What the tiny models share: the decoder's size, and prompts whose images are runs of one placeholder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from tests.engine.tiny_models import VOCABULARY, Rows, draw_text, pad_left, row_generator

IMAGE = 503

TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def clip_or_siglip(kind: str, side: int) -> dict[str, Any]:
    """A tower of ``side`` x ``side`` patches."""
    return {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": side * 14,
        "patch_size": 14,
    }


def prompts(
    rows: Rows,
    seed: int,
    n_tokens: Sequence[int],
    draw: Callable[[int, torch.Generator], Tensor],
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    video: Callable[[int, Generator], list[int]] | None = None,
) -> tuple[dict[str, Any], list[Tensor], list[int]]:
    """(ids and attention mask, what ``draw(kind, generator)`` gave for each image, its kind), in order.

    ``before`` and ``after`` are markers around every image. ``video(kind, generator)`` gives the ids of a video.
    """
    ids: list[list[int]] = []
    pixels: list[Tensor] = []
    kinds: list[int] = []
    for row in rows:
        generator = row_generator(row, seed)
        line: list[int] = []
        for segment, number in row:
            if segment == "text":
                line += draw_text(generator, number)
                continue
            if segment == "video":
                assert video is not None, "this family has no videos"
                line += video(number, generator)
                continue
            kind = number % len(n_tokens)
            line += [*before, *[IMAGE] * n_tokens[kind], *after]
            pixels.append(draw(kind, generator))
            kinds.append(kind)
        ids.append(line)
    padded, mask = pad_left(ids)
    return {"input_ids": padded, "attention_mask": mask}, pixels, kinds


def without_images(model: Any) -> Any:
    """Never generates the placeholder, which a forward without a cache would take for an image."""
    model.generation_config.suppress_tokens = [IMAGE]
    return model
