"""Qwen2-VL: M-RoPE, native resolution with a 2x2 patch merger.

Paper: https://arxiv.org/abs/2409.12191
Classes: transformers' Qwen2VLForConditionalGeneration.
"""

from __future__ import annotations

from typing import ClassVar

from ivcp_eval.interface import Checkpoint
from model_adapters.qwen2_5_vl import Adapter as Qwen25Adapter


class Adapter(Qwen25Adapter):
    """Wiring of Qwen2-VL, which is that of Qwen2.5-VL."""

    model_types = ("qwen2_vl",)
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("qwen2", "Qwen/Qwen2-VL-7B-Instruct"),
        Checkpoint("qwen2_2b", "Qwen/Qwen2-VL-2B-Instruct"),
        Checkpoint("qwen2_72b", "Qwen/Qwen2-VL-72B-Instruct"),
    )
    box_format = "qwen2_vl"
