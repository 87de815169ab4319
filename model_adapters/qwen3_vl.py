"""Qwen3-VL: interleaved M-RoPE, DeepStack (visual features added behind the first decoder layers), normed q and k.

Paper: https://arxiv.org/abs/2511.21631
Classes: transformers' Qwen3VLForConditionalGeneration.
Prompts: VLMEvalKit's Qwen3VLPromptMixin; grounding in the words of Qwen's own RefCOCO evaluation
(https://github.com/QwenLM/Qwen3-VL/issues/1721), whose boxes are thousandths of the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ivcp_eval.interface import Checkpoint, ModelFacts, QuestionKind, Signal
from model_adapters._vision import HALVES
from model_adapters.qwen2_5_vl import Adapter as Qwen25Adapter
from model_adapters.qwen2_5_vl import qwen_prompt

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(Qwen25Adapter):
    """Wiring of Qwen3-VL."""

    model_types = ("qwen3_vl",)
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("qwen3", "Qwen/Qwen3-VL-8B-Instruct"),
        Checkpoint("qwen3_2b", "Qwen/Qwen3-VL-2B-Instruct"),
        Checkpoint("qwen3_4b", "Qwen/Qwen3-VL-4B-Instruct"),
        Checkpoint("qwen3_32b", "Qwen/Qwen3-VL-32B-Instruct"),
    )
    box_format = "qwen3_vl"
    pixels = HALVES
    min_pixels = None  # the checkpoint's own limits
    max_pixels = None

    def facts(self, config: Any, family: str) -> ModelFacts:
        """DeepStack indexes the whole prompt behind its layers, so the first cut comes after them."""
        first = len(config.vision_config.deepstack_visual_indexes)
        return dataclasses.replace(super().facts(config, family), first_cut=first)

    def projection(self, layer: Any, signal: Signal) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """Queries and keys are normed per head before RoPE."""
        module, heads = super().projection(layer, signal)
        if signal not in ("query", "key"):
            return module, heads
        norm = layer.self_attn.q_norm if signal == "query" else layer.self_attn.k_norm
        return module, lambda states: norm(heads(states))

    def pixel_options(self, min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
        """As Qwen2.5-VL; without limits the checkpoint's own."""
        return {} if min_pixels is None and max_pixels is None else super().pixel_options(min_pixels, max_pixels)

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """Multiple choice and yes/no as Qwen2.5-VL, short answers and grounding in Qwen3-VL's words."""
        if kind == "grounding":
            return (
                f'Locate every object that matches the description "{question}" in the image. '
                "Report bbox coordinates in JSON format."
            )
        if kind == "short_answer":
            return f"{question}\nPlease answer concisely with short words or phrases when possible."
        return qwen_prompt(kind, question, options, hint)

    def box_frame(self, processor: Any, inputs: Mapping[str, Tensor], sample: int) -> tuple[int, int] | None:
        """None: boxes are thousandths of the image."""
        return None
