"""InternVL2.5 and InternVL3: InternViT tiles and a thumbnail, pixel shuffle, InternLM2 or Qwen2.5.

Papers: https://arxiv.org/abs/2412.05271, https://arxiv.org/abs/2504.10479
Classes: transformers' InternVLForConditionalGeneration; InternLM2 runs as Llama, of which it is a renaming with fused
query, key and value weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ivcp_eval.interface import ImageSpan
from model_adapters._transformers import AbstractTransformersAdapter, image_runs

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(AbstractTransformersAdapter):
    """Wiring of InternVL, and of its language models used alone (then `prune` needs ``image_mask=``)."""

    model_types = ("internvl", "llama", "qwen2")
    closing_tokens = 1  # </img>

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """One image per run of <IMG_CONTEXT>: its tiles, row by row, and the thumbnail last."""
        return [[ImageSpan(run) for run in image_runs(row)] for row in mask]
