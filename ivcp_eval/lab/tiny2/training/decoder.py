"""The decoder in training: many questions about a picture share the picture's tokens.

Same parameters and mathematics as the stock ``Qwen2_5_VLTextModel`` (a test holds them equal): every question sees
the prefix (system turn and pictures) and itself, at the positions it would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ivcp_eval.lab.tiny.training.fast import EAGER, Kernels

Groups = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """Layout of a training sequence: prefix, then groups of equally long question slots.

    Attributes:
        prefix: tokens of the prefix.
        groups: (slots, tokens of a slot) of each group.
        positions: (3, tokens) M-RoPE positions (time, row, column) of every token.
        visual: (visual tokens,) places of the pictures' tokens in the prefix, pictures in order.
    """

    prefix: int
    groups: Groups
    positions: Tensor
    visual: Tensor

    def to(self, device: torch.device) -> Layout:
        """The layout on ``device``."""
        return Layout(self.prefix, self.groups, self.positions.to(device), self.visual.to(device))


def _layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor, ...],
    key_heads: int,
    epsilon: float,
    layout: Layout,
    last: bool,
    kernels: Kernels,
) -> Tensor:
    """One decoder layer on (batch, tokens, hidden); only the slots' tokens come out if ``last``."""
    norm1, qkv_weight, qkv_bias, output, norm2, gate_up, down = weights
    qkv = F.linear(kernels.rms_norm(x, norm1, epsilon), qkv_weight, qkv_bias)
    mixed = _attention(qkv, cos, sin, key_heads, layout, last, kernels)
    # Nothing reads the prefix behind the last layer, so that layer computes only its keys and values.
    x = (x[:, layout.prefix :] if last else x) + F.linear(mixed, output)
    gate, up = F.linear(kernels.rms_norm(x, norm2, epsilon), gate_up).chunk(2, dim=-1)
    return x + F.linear(kernels.gated(gate, up), down)


def _attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int, layout: Layout, last: bool, kernels: Kernels
) -> Tensor:
    """Attention of every token to the prefix up to itself and, in a slot, to the slot up to itself."""
    prefix, groups, size = layout.prefix, layout.groups, cos.shape[-1]
    query_heads = qkv.shape[-1] // size - 2 * key_heads
    q, k, v = qkv.unflatten(-1, (-1, size)).split((query_heads, key_heads, key_heads), dim=2)
    scale = size**-0.5
    # Query heads that share a key head are folded into one axis: (batch, key heads, group, tokens, size).
    q = kernels.rotate(q, cos * scale, sin * scale).unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4)
    k, v = kernels.rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
    lengths = [prefix, *(count * length for count, length in groups)]
    q_prefix, *q_slots = q.split(lengths, dim=3)
    k_prefix, *k_slots = k.split(lengths, dim=2)
    v_prefix, *v_slots = v.split(lengths, dim=2)
    outputs = []
    if not last:
        # Heads of one group side by side: the library's fused attention wants as many keys as queries.
        group = q_prefix.shape[2]
        wide_k, wide_v = (t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k_prefix, v_prefix))
        mixed = F.scaled_dot_product_attention(q_prefix.flatten(1, 2), wide_k, wide_v, is_causal=True, scale=1.0)
        outputs.append(mixed.unflatten(1, (-1, group)))
    for (count, length), own_q, own_k, own_v in zip(groups, q_slots, k_slots, v_slots, strict=True):
        # (batch, key heads, count, group, length, size) for attention inside the slots.
        split_q = own_q.unflatten(3, (count, length)).transpose(2, 3)
        own = _fold(split_q, own_k.unflatten(2, (count, length)).transpose(-1, -2)) + _future(length, qkv)
        shared = _fold(own_q, k_prefix.transpose(-1, -2)).unflatten(3, (count, length)).transpose(2, 3)
        probabilities = torch.softmax(torch.cat((shared, own), dim=-1), dim=-1)
        to_prefix, to_own = probabilities.split((prefix, length), dim=-1)
        from_own = _fold(to_own, own_v.unflatten(2, (count, length))).transpose(2, 3).flatten(3, 4)
        outputs.append(from_own + _fold(to_prefix.transpose(2, 3).flatten(3, 4), v_prefix))
    return torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4).flatten(2)


def _fold(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (..., group, rows, a) by (..., a, b) with the group folded into the rows (one larger product)."""
    group, rows = left.shape[-3], left.shape[-2]
    return torch.matmul(left.flatten(-3, -2), right).unflatten(-2, (group, rows))


def _future(size: int, like: Tensor) -> Tensor:
    """(size, size) mask to add to scores: nothing looks ahead."""
    return torch.full((size, size), -1e4, dtype=like.dtype, device=like.device).triu(1)


def decode(
    text: Any, embeddings: Tensor, layout: Layout, kernels: Kernels = EAGER, layers: Sequence[int] | None = None
) -> Tensor:
    """Hidden states (batch, slot tokens, hidden) after the final norm of embeddings with visual tokens in place.

    Only ``layers`` take part (all for None).
    """
    cos, sin = text.rotary_emb(embeddings, layout.positions[:, None])
    cos, sin = cos[0, :, None], sin[0, :, None]
    x = embeddings
    chosen = range(len(text.layers)) if layers is None else layers
    for index in chosen:
        layer = text.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = (
            layer.input_layernorm.weight,
            torch.cat([p.weight for p in parts]),
            torch.cat([p.bias for p in parts]),
            attention.o_proj.weight,
            layer.post_attention_layernorm.weight,
            torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
            mlp.down_proj.weight,
        )
        epsilon = layer.input_layernorm.variance_epsilon
        heads = attention.num_key_value_heads
        x = _layer(x, cos, sin, weights, heads, epsilon, layout, index == chosen[-1], kernels)
    return kernels.rms_norm(x, text.norm.weight, text.norm.variance_epsilon)
