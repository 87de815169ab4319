"""Where things are in a DeepSeek-VL2 model, and in its language model alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.interface import Signal
from model_adapters._transformers import AbstractTransformersAdapter, rotate_half, split_heads

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(AbstractTransformersAdapter):
    """Wiring of DeepSeek-VL2, and of DeepseekV2 language models used alone (then `prune` needs ``image_mask=``)."""

    model_types = ("deepseek_v2",)

    def multimodal_model(self, model: Any) -> Any:
        """``model.model``; of a language model alone its decoder."""
        return model.model

    def text_model(self, model: Any) -> Any:
        """``model.model.language_model``; of a language model alone ``model.model``."""
        return getattr(model.model, "language_model", model.model)

    def image_mask(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """None for a language model alone: it does not know which tokens show an image."""
        if self.text_model(model) is model.model:
            return None
        return super().image_mask(model, inputs)

    def projection(self, layer: Any, signal: Signal) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """MLA: values are the v part of ``kv_b_proj``; keys and queries are [without RoPE, rotary] head vectors.

        MLA has no module that holds a whole key: the rotary part is in ``kv_a_proj_with_mqa``, shared by the heads,
        the rest is ``kv_b_proj`` of the normed latent. Both are computed from the former's output.
        """
        attention = layer.self_attn
        if not hasattr(attention, "kv_b_proj"):
            return super().projection(layer, signal)
        if signal == "value":
            return attention.kv_b_proj, lambda states: _expanded(attention, states)[1]
        if signal == "key":
            return attention.kv_a_proj_with_mqa, lambda states: _mla_keys(attention, states)
        if attention.q_proj is not None:
            return attention.q_proj, lambda states: split_heads(states, attention.qk_head_dim)

        def low_rank(states: Tensor) -> Tensor:
            return split_heads(attention.q_b_proj(attention.q_a_layernorm(states)), attention.qk_head_dim)

        return attention.q_a_proj, low_rank

    def rotate(self, states: Tensor, position_embeddings: Any) -> Tensor:
        """MLA: turn neighbouring pairs of the last R dimensions; the others carry no position.

        ``position_embeddings``: (1, n, R/2) complex, or Llama-like (cos, sin) where the model has no MLA.
        """
        if not isinstance(position_embeddings, torch.Tensor):
            cos, sin = (part[0].to(states.dtype) for part in position_embeddings)
            return states * cos + rotate_half(states) * sin
        angles = position_embeddings[0]
        plain, rotary = states.split([states.shape[-1] - 2 * angles.shape[-1], 2 * angles.shape[-1]], dim=-1)
        turned = torch.view_as_complex(rotary.float().unflatten(-1, (-1, 2)).contiguous()) * angles
        return torch.cat((plain, torch.view_as_real(turned).flatten(-2).to(states.dtype)), dim=-1)


def _expanded(attention: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """(keys without RoPE, values), (B, H, S, *) each, from the output of ``kv_b_proj``, (B, 1, S, *) or (B, S, *)."""
    states = states.reshape(states.shape[0], states.shape[-2], states.shape[-1])
    sizes = [attention.qk_nope_head_dim, attention.v_head_dim]
    keys, values = split_heads(states, sum(sizes)).split(sizes, dim=-1)
    return keys, values


def _mla_keys(attention: Any, states: Tensor) -> Tensor:
    """(B, H, S, nope + rope) keys before RoPE from the output of ``kv_a_proj_with_mqa``."""
    latent, rotary = states.split([attention.kv_lora_rank, attention.qk_rope_head_dim], dim=-1)
    plain, _ = _expanded(attention, attention.kv_b_proj(attention.kv_a_layernorm(latent)))
    return torch.cat((plain, rotary[:, None].expand(-1, plain.shape[1], -1, -1)), dim=-1)
