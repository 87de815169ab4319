"""InternVL2.5 and InternVL3: InternViT tiles and a thumbnail, pixel shuffle, InternLM2 or Qwen2.5.

Papers: https://arxiv.org/abs/2412.05271, https://arxiv.org/abs/2504.10479
Classes: transformers' InternVLForConditionalGeneration; InternLM2 runs as Llama, of which it is a renaming with fused
query, key and value weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ivcp_eval.interface import ImageSpan, VisionTap
from model_adapters._transformers import AbstractTransformersAdapter, image_runs
from model_adapters._vision import vit_layers, vit_tap

if TYPE_CHECKING:
    from torch import Tensor

TILE = 256  # tokens of a tile in every published model


class Adapter(AbstractTransformersAdapter):
    """Wiring of InternVL, and of its language models used alone (then `prune` needs ``image_mask=``)."""

    model_types = ("internvl", "llama", "qwen2")
    closing_tokens = 1  # </img>

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """One image per run of <IMG_CONTEXT>: its tiles, row by row, and the thumbnail last.

        How the tiles lie, (w, h), is not among the model's inputs; `tile_grid` finds it from the image's size.
        """
        tile = getattr(model.config, "image_seq_length", TILE)
        return [[_span(run, tile) for run in image_runs(row)] for row in mask]

    def vision_tap(self, model: Any) -> VisionTap | None:
        """The block whose output goes to pixel shuffle; a visual token is a square of its patches."""
        tower, index = getattr(model.model, "vision_tower", None), getattr(model.config, "vision_feature_layer", None)
        if tower is None or not isinstance(index, int):
            return None
        layer = vit_layers(tower)[index if index < 0 else index - 1]
        pool = round(1 / model.config.downsample_ratio)
        return vit_tap(tower, layer, layer.attention, class_token=True, pool=pool)


def _span(run: Tensor, tile: int) -> ImageSpan:
    n = run.numel()
    if n % tile:
        return ImageSpan(run)
    side = round(tile**0.5)
    return ImageSpan(run, views=(tile,) * (n // tile), grid=(side, side) if n == tile == side * side else None)


def tile_grid(image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(w, h) tiles that the image processor cuts an image of ``size`` (width, height) into."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    tile = image_processor.size["height"], image_processor.size["width"]
    limits = image_processor.min_patches, image_processor.max_patches
    columns, rows = get_optimal_tiled_canvas((size[1], size[0]), tile, *limits)
    return columns, rows
