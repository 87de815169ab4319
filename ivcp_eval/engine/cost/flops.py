"""Floating-point operations of a decoder's prefill: the bound that a pruned prefill is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder layer: grouped-query attention and a gated MLP, or what takes their place.

    Attributes:
        head_dim: of queries and keys. value_dim: of values; None: the same.
        projections: multiply-adds per token of the attention's projections where they are not Llama's (latent
            attention); None: ``q``, ``k``, ``v`` and ``o`` of grouped-query attention.
        mlps: multiply-adds per token of each layer's MLP where layers differ (experts: those that one token visits,
            and the router); empty: a gated MLP of ``intermediate`` in every layer.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    value_dim: int | None = None
    projections: int | None = None
    mlps: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """From a transformers configuration of a model or of its text part: Llama-like, or DeepSeek V2 and V3.

        A mapping is the content of such a text part.
        """
        config = SimpleNamespace(**config) if isinstance(config, Mapping) else config.get_text_config()
        latent = getattr(config, "kv_lora_rank", None) is not None
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.qk_nope_head_dim + config.qk_rope_head_dim if latent else head_dim,
            intermediate=config.intermediate_size,
            value_dim=config.v_head_dim if latent else None,
            projections=_latent_projections(config) if latent else None,
            mlps=_expert_mlps(config) if getattr(config, "moe_intermediate_size", None) else (),
        )

    def layer_flops(
        self, tokens: float, layer: int = 0, pairs: float | None = None, mlp_tokens: float | None = None
    ) -> float:
        """One layer on ``tokens`` of one row: two per multiply-add, a causal attention's n (n + 1) / 2 pairs only.

        Matrix products alone; norms, RoPE, softmax and activations are left out, as usual. A fraction of a token is
        allowed, for costs before rounding.

        Args:
            pairs: of tokens that the attention looks at (mean over heads), where it leaves some out.
            mlp_tokens: how many of them the MLP processes, where it skips some.
        """
        projections = self.projections
        if projections is None:
            projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.mlps[layer] if self.mlps else 3 * self.hidden * self.intermediate
        pairs = tokens * (tokens + 1) / 2 if pairs is None else pairs
        mlp_tokens = tokens if mlp_tokens is None else mlp_tokens
        per_pair = self.head_dim + (self.head_dim if self.value_dim is None else self.value_dim)
        return 2 * (tokens * projections + mlp_tokens * mlp) + 2 * pairs * self.heads * per_pair

    def prefill_flops(self, tokens_per_layer: Sequence[float]) -> float:
        """All layers, each on its own number of tokens of one row (vocabulary head excluded).

        Raises:
            ValueError: not one number per layer.
        """
        if len(tokens_per_layer) != self.layers:
            raise ValueError(f"got token counts of {len(tokens_per_layer)} layers, the decoder has {self.layers}")
        return sum(self.layer_flops(tokens, layer) for layer, tokens in enumerate(tokens_per_layer))


def _latent_projections(config: Any) -> int:
    """Of multi-head latent attention as the prefill runs it: keys and values expanded, nothing absorbed."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    rank = config.q_lora_rank
    down = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    up = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    q = hidden * query if rank is None else hidden * rank + rank * query
    return int(q + down + up + heads * config.v_head_dim * hidden)


def _expert_mlps(config: Any) -> tuple[int, ...]:
    """Per layer: dense layers first, then router, routed and shared experts."""
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is None:
        dense = config.first_k_dense_replace
        kinds = ["dense"] * dense + ["sparse"] * (config.num_hidden_layers - dense)
    visited = config.num_experts_per_tok + (getattr(config, "n_shared_experts", None) or 0)
    sparse = 3 * config.hidden_size * config.moe_intermediate_size * visited
    sparse += config.hidden_size * config.n_routed_experts
    return tuple(sparse if kind == "sparse" else 3 * config.hidden_size * config.intermediate_size for kind in kinds)
