"""Floating-point operations of a decoder's prefill: the bound that a pruned prefill is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-like decoder layer: grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """From a transformers text configuration."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            intermediate=config.intermediate_size,
        )

    def layer_flops(self, tokens: int) -> int:
        """One layer on ``tokens`` of one row: two per multiply-add, a causal attention's n (n + 1) / 2 pairs only.

        Matrix products alone; norms, RoPE, softmax and activations are left out, as usual.
        """
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        pairs = tokens * (tokens + 1) // 2
        return 2 * tokens * (projections + mlp) + 2 * 2 * pairs * self.heads * self.head_dim

    def prefill_flops(self, tokens_per_layer: Sequence[int]) -> int:
        """All layers, each on its own number of tokens of one row (vocabulary head excluded).

        Raises:
            ValueError: not one number per layer.
        """
        if len(tokens_per_layer) != self.layers:
            raise ValueError(f"got token counts of {len(tokens_per_layer)} layers, the decoder has {self.layers}")
        return sum(self.layer_flops(tokens) for tokens in tokens_per_layer)
