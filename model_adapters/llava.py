"""LLaVA-1.5: CLIP at one fixed resolution, MLP projector, Vicuna.

Paper: https://arxiv.org/abs/2310.03744
Classes: transformers' LlavaForConditionalGeneration with the ``llava-hf`` checkpoints.
Prompts: VLMEvalKit's LLaVA class, and https://github.com/FireRedTeam/IVC-Prune @ 03afd9c, which agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ivcp_eval.interface import GREEDY, Checkpoint, ImageSpan, QuestionKind, Rectangle, View, VisionTap
from model_adapters._prompts import letter_question
from model_adapters._transformers import AbstractTransformersAdapter, image_runs
from model_adapters._vision import feature_tap, mergeable

if TYPE_CHECKING:
    from torch import Tensor

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


class Adapter(AbstractTransformersAdapter):
    """Wiring of LLaVA-1.5."""

    model_types = ("llava",)
    no_videos = "its model takes pictures only"
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("llava15", "llava-hf/llava-1.5-7b-hf"),
        Checkpoint("llava15_13b", "llava-hf/llava-1.5-13b-hf"),
    )
    generation: ClassVar[Mapping[str, Any]] = {**GREEDY, "max_new_tokens": 2048}

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """Images of the fixed number of tokens; nothing stands between consecutive ones (``<image><image>``)."""
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        n = side * side + (model.config.vision_feature_select_strategy == "full")  # "full" keeps the class token
        return [[span for run in image_runs(row) for span in _split(run, n, side)] for row in mask]

    def vision_tap(self, model: Any) -> VisionTap | None:
        """The block whose output the projector reads, the last but one (as VisionZip's LLaVA code)."""
        kept_class = model.config.vision_feature_select_strategy != "default"  # then it is a visual token
        tap = None if kept_class else feature_tap(model)
        return None if tap is None else mergeable(tap)

    def covered(self, processor: Any, size: tuple[int, int]) -> Rectangle:
        """The published processors cut a square out of the middle; ones that pad it to a square show all of it."""
        images = processor.image_processor
        width, height = size
        frame_width, frame_height = (max(size),) * 2 if images.do_pad else size
        if images.do_center_crop and (edge := images.size.get("shortest_edge")):
            scale = edge / min(frame_width, frame_height)
            frame_width = min(frame_width, images.crop_size["width"] / scale)
            frame_height = min(frame_height, images.crop_size["height"] / scale)
        across, down = frame_width / width / 2, frame_height / height / 2
        return 0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """Multiple choice has a wording of its own; LLaVA-1.5 was not trained to ground."""
        return letter_question(question, options, hint) if kind == "mcq" else None

    def turn(self, processor: Any, parts: list[Mapping[str, Any]]) -> str:
        """Vicuna's system sentence and ``USER: ... ASSISTANT:``, which the chat template of ``llava-hf`` leaves out."""
        content = "".join(" <image> " if "image" in part else part["text"] for part in parts)
        return f"{SYSTEM}USER: {content} ASSISTANT: "


def _split(run: Tensor, n: int, side: int) -> list[ImageSpan]:
    """A run of whole images in pieces of ``n``; any other run (a mask given by the user) is one image."""
    if run.numel() % n:
        return [ImageSpan(run)]
    grid = (side, side) if n == side * side else None
    return [ImageSpan(columns, grid=grid, lay_out=_square) for columns in torch.split(run, n)]


def _square(span: ImageSpan) -> tuple[View, ...]:
    """Behind the class token, where that is kept. How much of the picture it shows: `Adapter.covered`."""
    n = span.columns.numel()
    side = math.isqrt(n)
    return (View("picture", np.arange(n - side * side, n).reshape(side, side)),)
