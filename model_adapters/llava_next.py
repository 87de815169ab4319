"""LLaVA-NeXT (1.6): an overview of the image, then its tiles as one unpadded grid with a newline token per row.

Source: https://llava-vl.github.io/blog/2024-01-30-llava-next/
Classes: transformers' LlavaNextForConditionalGeneration with the ``llava-hf`` checkpoints.
Prompts: VLMEvalKit's LLaVA_Next class, in the chat template of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ivcp_eval.interface import Checkpoint, ImageSpan, QuestionKind
from model_adapters._prompts import letter_question
from model_adapters._transformers import AbstractTransformersAdapter, encoded_lengths, image_runs, images_by_length

if TYPE_CHECKING:
    from torch import Tensor

Views = tuple[int, ...]


class Adapter(AbstractTransformersAdapter):
    """Wiring of LLaVA-NeXT."""

    model_types = ("llava_next",)
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("llava_next", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        Checkpoint("llava_next_13b", "llava-hf/llava-v1.6-vicuna-13b-hf"),
        Checkpoint("llava_next_mistral", "llava-hf/llava-v1.6-mistral-7b-hf"),
        Checkpoint("llava_next_34b", "llava-hf/llava-v1.6-34b-hf"),
        Checkpoint("llava_next_llama3", "llava-hf/llama3-llava-next-8b-hf"),
    )

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """Images by their lengths (of ``image_sizes``, or already encoded); nothing stands between consecutive ones.

        Newline tokens count as the image's: they stand for its rows.
        """
        lengths, overview = encoded_lengths(inputs), _side(model.config) ** 2
        views = self.views(model.config, inputs) if lengths is None else [(overview, n - overview) for n in lengths]
        rows = images_by_length(mask, [sum(view) for view in views])
        if rows is None:  # a mask given by the user
            return [[ImageSpan(run) for run in image_runs(row)] for row in mask]
        spans = []
        for row, images in zip(mask, rows, strict=True):
            columns = torch.split(row.nonzero().flatten(), [sum(views[i]) for i in images])
            spans.append([ImageSpan(c, views=views[i]) for c, i in zip(columns, images, strict=True)])
        return spans

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """Multiple choice has a wording of its own."""
        return letter_question(question, options, hint) if kind == "mcq" else None

    def views(self, config: Any, inputs: Mapping[str, Any]) -> list[Views]:
        """Tokens of the overview and of the tiled view, newlines included, of every image of the batch."""
        overview = _side(config) ** 2
        sizes = inputs.get("image_sizes")
        grids = [tiled_grid(config, size) for size in ([] if sizes is None else sizes.tolist())]
        return [(overview, rows * (columns + 1)) for rows, columns in grids]


def _side(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def tiled_grid(config: Any, size: list[int]) -> tuple[int, int]:
    """(rows, columns) of the tiled view of an image of ``size`` (height, width), padding removed."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    shape = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    side = _side(config)
    _, rows, columns = unpad_image(torch.empty(0, shape[0] * side, shape[1] * side), size).shape
    return rows, columns
