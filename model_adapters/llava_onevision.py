"""LLaVA-OneVision: SigLIP tiles like LLaVA-NeXT's (single images), one overview each for several images, Qwen2.

Paper: https://arxiv.org/abs/2408.03326
Classes: transformers' LlavaOnevisionForConditionalGeneration with the ``llava-hf`` checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ivcp_eval.interface import Checkpoint
from model_adapters.llava_next import Adapter as LlavaNextAdapter
from model_adapters.llava_next import _side, tiled_grid

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(LlavaNextAdapter):
    """Wiring of LLaVA-OneVision."""

    model_types = ("llava_onevision",)
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("llava_ov", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        Checkpoint("llava_ov_05b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"),
        Checkpoint("llava_ov_72b", "llava-hf/llava-onevision-qwen2-72b-ov-hf"),
    )

    def grids(self, config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """As LLaVA-NeXT, the tiled view shrunk to at most N tiles' worth of tokens (``anyres_max_N``).

        In a sample of several images each is an overview and one newline, which is what ``batch_num_images`` tells.
        """
        sizes = inputs.get("image_sizes")
        sizes = [] if sizes is None else sizes.tolist()
        alone = _alone(inputs, len(sizes))
        return [
            _shrunk(config, *tiled_grid(config, size)) if tiled else (1, 0)
            for size, tiled in zip(sizes, alone, strict=True)
        ]

    def tiles(self, config: Any, inputs: Mapping[str, Any]) -> list[int]:
        """As LLaVA-NeXT; one, the overview, where a sample has several images."""
        whole = super().tiles(config, inputs)
        return [n if tiled else 1 for n, tiled in zip(whole, _alone(inputs, len(whole)), strict=True)]

    def pack(self, model: Any, tiles: list[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
        """The model's layout, which shrinks bilinearly."""
        lines, _ = model.pack_image_features(
            tiles, sizes, image_newline=newline, vision_aspect_ratio=model.config.vision_aspect_ratio
        )
        return list(lines)


def _alone(inputs: Mapping[str, Any], n: int) -> list[bool]:
    """Of ``n`` images, whether each is the only one of its sample; all are where nothing is said."""
    counts = inputs.get("batch_num_images")
    return [True] * n if counts is None else [c == 1 for c in counts.tolist() for _ in range(c)]


def _shrunk(config: Any, rows: int, columns: int) -> tuple[int, int]:
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * _side(config) ** 2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
