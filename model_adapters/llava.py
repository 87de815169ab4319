"""LLaVA-1.5: CLIP at one fixed resolution, MLP projector, Vicuna.

Paper: https://arxiv.org/abs/2310.03744
Classes: transformers' LlavaForConditionalGeneration with the ``llava-hf`` checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.interface import ImageSpan, VisionTap
from model_adapters._transformers import AbstractTransformersAdapter, image_runs
from model_adapters._vision import vit_layers, vit_tap

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(AbstractTransformersAdapter):
    """Wiring of LLaVA-1.5."""

    model_types = ("llava",)

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """Images of the fixed number of tokens; nothing stands between consecutive ones (``<image><image>``)."""
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        n = side * side + (model.config.vision_feature_select_strategy == "full")  # "full" keeps the class token
        grid = (side, side) if n == side * side else None
        return [[span for run in image_runs(row) for span in _split(run, n, grid)] for row in mask]

    def vision_tap(self, model: Any) -> VisionTap | None:
        """The block whose output goes to the projector, the last but one of CLIP: the one VisionZip reads."""
        tower, index = getattr(model.model, "vision_tower", None), getattr(model.config, "vision_feature_layer", None)
        if tower is None or not isinstance(index, int):
            return None
        layer = vit_layers(tower)[index if index < 0 else index - 1]
        class_token = model.config.vision_feature_select_strategy == "default"
        return vit_tap(tower, layer, layer.self_attn, class_token=class_token)


def _split(run: Tensor, n: int, grid: tuple[int, int] | None) -> list[ImageSpan]:
    """A run of whole images in pieces of ``n``; any other run (a mask given by the user) is one image."""
    if run.numel() % n:
        return [ImageSpan(run)]
    return [ImageSpan(columns, grid=grid) for columns in torch.split(run, n)]
