"""Qwen3-VL: interleaved M-RoPE, DeepStack (visual features added behind the first decoder layers), normed q and k.

Paper: https://arxiv.org/abs/2511.21631
Classes: transformers' Qwen3VLForConditionalGeneration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from ivcp_eval.interface import Checkpoint, ModelFacts, Signal
from model_adapters.qwen2_5_vl import Adapter as Qwen25Adapter

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(Qwen25Adapter):
    """Wiring of Qwen3-VL."""

    model_types = ("qwen3_vl",)
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = tuple(
        Checkpoint(f"qwen3_{size}", f"Qwen/Qwen3-VL-{size.upper()}-Instruct") for size in ("2b", "4b", "8b", "32b")
    )
    box_format = "qwen3_vl"

    def facts(self, model: Any, family: str) -> ModelFacts:
        """DeepStack indexes the whole prompt behind its layers, so the first cut comes after them."""
        layers = len(self.text_model(model).layers)
        return ModelFacts(family, layers, first_cut=len(model.config.vision_config.deepstack_visual_indexes))

    def projection(self, layer: Any, signal: Signal) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """Queries and keys are normed per head before RoPE."""
        module, heads = super().projection(layer, signal)
        if signal not in ("query", "key"):
            return module, heads
        norm = layer.self_attn.q_norm if signal == "query" else layer.self_attn.k_norm
        return module, lambda states: norm(heads(states))
