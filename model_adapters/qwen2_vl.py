"""Qwen2-VL: M-RoPE, native resolution with a 2x2 patch merger.

Paper: https://arxiv.org/abs/2409.12191
Classes: transformers' Qwen2VLForConditionalGeneration.
Prompts: VLMEvalKit's Qwen2VLPromptMixin; grounding as the README's "Detect the bounding box".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ivcp_eval.interface import Checkpoint, QuestionKind
from model_adapters.qwen2_5_vl import Adapter as Qwen25Adapter
from model_adapters.qwen2_5_vl import qwen_prompt

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(Qwen25Adapter):
    """Wiring of Qwen2-VL, which is that of Qwen2.5-VL."""

    model_types = ("qwen2_vl",)
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("qwen2", "Qwen/Qwen2-VL-7B-Instruct"),
        Checkpoint("qwen2_2b", "Qwen/Qwen2-VL-2B-Instruct"),
        Checkpoint("qwen2_72b", "Qwen/Qwen2-VL-72B-Instruct"),
    )
    box_format = "qwen2_vl"
    # VLMEvalKit's own entries of these models (config.py, Qwen2-VL-*-Instruct).
    min_pixels = 1280 * 28 * 28
    max_pixels = 16384 * 28 * 28

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """Qwen's wording, but boxes are asked for in Qwen2-VL's own way."""
        if kind == "grounding":
            return f"Detect the bounding box of <|object_ref_start|>{question}<|object_ref_end|>."
        return qwen_prompt(kind, question, options, hint)

    def box_frame(self, processor: Any, inputs: Mapping[str, Tensor], sample: int) -> tuple[int, int] | None:
        """None: boxes are thousandths of the image."""
        return None
