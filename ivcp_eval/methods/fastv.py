"""Keeps the visual tokens that the prompt's last token attends to most, in an early decoder layer.

Paper: https://arxiv.org/abs/2403.06764 (section 4.1: average attention of layer K, filtering ratio R).
Reference: https://github.com/pkunlp-icler/FastV @ d165972 (modeling_llama.py of src/FastV/llava-hf)

Layer K's input is cut by the attention of layer K-1; the caches of layers before K stay whole; positions stay.

Differs: each image has its own budget, ``round(ratio * N)``, where the released code knows one image; scores are
float32. K is the paper's 2; the runnable release (README and demo) uses 3, and its demo chooses anew at every step,
without a cache. The attention of the one row is computed from queries and keys, not asked from the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ivcp_eval.interface import AbstractScorer, Cut, Faithfulness, ModelFacts, Signal, Signals
from ivcp_eval.interface.ops import last_token, mean_attention


@dataclass(frozen=True)
class Method(AbstractScorer):
    """FastV.

    Attributes:
        layer: K, the decoder layer whose input is cut; at least 1. Families whose first layers cannot be cut
            (Qwen3-VL adds visual features there) are cut after these.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    layer: int = 2

    def __post_init__(self) -> None:
        """Refuse a layer without one before it."""
        if self.layer < 1:
            raise ValueError(f"layer {self.layer} has no layer before it whose attention could rank; use 1 or more")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut; earlier caches keep everything."""
        return (Cut(max(self.layer, model.first_cut), ratio, cache="from_cut"),)

    def score(self, signals: Signals) -> Tensor:
        """Attention of the last token, mean over heads."""
        return mean_attention(signals, last_token(signals))
