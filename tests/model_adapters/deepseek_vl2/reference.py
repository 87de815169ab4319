"""DeepSeek-VL2 from the published tensors with plain torch, slowly: token by token, head by head, expert by expert.

An independent path: it uses no class of transformers or of model_adapters. Each step follows the formulas of the
release (github deepseek-ai/DeepSeek-VL2 @ ef9f91e), not those of the classes it is compared with: absorbed latent
attention, one expert at a time, `unfold` in the projector, cells placed one by one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, pad, silu, unfold

Tensors = dict[str, Tensor]


def tower(weights: Tensors, pixels: Tensor, heads: int) -> Tensor:
    """(3, P, P) -> (patches, C)."""
    w = {name.removeprefix("vision."): tensor for name, tensor in weights.items() if name.startswith("vision.")}
    patch = w["patch_embed.proj.weight"].shape[-1]
    x = conv2d(pixels[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)[0]
    x = x.flatten(1).T + w["pos_embed"][0]
    width, index = x.shape[1], 0

    def norm(name: str, states: Tensor) -> Tensor:
        return layer_norm(states, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    while f"blocks.{index}.norm1.weight" in w:
        block = f"blocks.{index}"
        joined = linear(norm(f"{block}.norm1", x), w[f"{block}.attn.qkv.weight"], w[f"{block}.attn.qkv.bias"])
        query, key, value = joined.reshape(-1, 3, heads, width // heads).unbind(1)
        mixed = []
        for head in range(heads):
            logits = query[:, head] @ key[:, head].T / math.sqrt(width // heads)
            mixed.append(logits.softmax(-1) @ value[:, head])
        x = x + linear(torch.cat(mixed, -1), w[f"{block}.attn.proj.weight"], w[f"{block}.attn.proj.bias"])
        hidden = linear(norm(f"{block}.norm2", x), w[f"{block}.mlp.fc1.weight"], w[f"{block}.mlp.fc1.bias"])
        hidden = gelu(hidden, approximate="tanh")
        x = x + linear(hidden, w[f"{block}.mlp.fc2.weight"], w[f"{block}.mlp.fc2.bias"])
        index += 1
    return norm("norm", x)


def projector(weights: Tensors, patches: Tensor) -> Tensor:
    """(patches, C) -> (g, g, E)."""
    side = math.isqrt(patches.shape[0])
    image = patches.reshape(side, side, -1).permute(2, 0, 1)[None]
    cells = unfold(pad(image, (0, side % 2, 0, side % 2)), kernel_size=2, stride=2)[0].T
    hidden = linear(cells, weights["projector.layers.0.weight"], weights["projector.layers.0.bias"])
    made = linear(gelu(hidden), weights["projector.layers.2.weight"], weights["projector.layers.2.bias"])
    return made.reshape(math.isqrt(made.shape[0]), math.isqrt(made.shape[0]), -1)


def image_tokens(weights: Tensors, pixels: Tensor, tiles: tuple[int, int], heads: int, head_first: bool) -> Tensor:
    """(1 + w h, 3, P, P) -> (N, E), cell by cell."""
    views = [projector(weights, tower(weights, view, heads)) for view in pixels]
    side, (width, height) = views[0].shape[0], tiles
    newline = weights["image_newline"]
    thumbnail = []
    for y in range(side):
        thumbnail += [views[0][y, x] for x in range(side)] + [newline]
    detail = []
    for y in range(height * side):
        for x in range(width * side):
            detail.append(views[1 + (y // side) * width + x // side][y % side, x % side])
        detail.append(newline)
    separator = [weights["view_seperator"]]
    return torch.stack(thumbnail + separator + detail if head_first else detail + separator + thumbnail)


def language(weights: Tensors, config: dict[str, Any], embeds: Tensor) -> Tensor:
    """(S, E) -> logits (S, vocabulary), positions 0..S-1."""
    w = {name.removeprefix("language."): tensor for name, tensor in weights.items() if name.startswith("language.")}
    x = embeds
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        normed = _rms(x, w[f"{layer}.input_layernorm.weight"])
        attend = _latent_attention if config.get("use_mla", True) else _attention
        x = x + attend(w, f"{layer}.self_attn", config, normed)
        normed = _rms(x, w[f"{layer}.post_attention_layernorm.weight"])
        mlp = f"{layer}.mlp"
        dense = index < config["first_k_dense_replace"]
        x = x + (_gated(w, mlp, normed) if dense else _experts(w, mlp, config, normed))
    return linear(_rms(x, w["model.norm.weight"]), w["lm_head.weight"])


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _gated(w: Tensors, name: str, x: Tensor) -> Tensor:
    up = silu(linear(x, w[f"{name}.gate_proj.weight"])) * linear(x, w[f"{name}.up_proj.weight"])
    return linear(up, w[f"{name}.down_proj.weight"])


def _angles(n: int, dims: int) -> Tensor:
    return torch.arange(n)[:, None].float() * 10000.0 ** -(torch.arange(0, dims, 2).float() / dims)


def _turn_halves(x: Tensor) -> Tensor:
    """Llama's RoPE: dimension i is paired with i + D/2. (S, D)."""
    angles = _angles(*x.shape)
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _turn_pairs(x: Tensor) -> Tensor:
    """The latent attention's RoPE: neighbours are paired; they are sorted into halves first. (S, D)."""
    return _turn_halves(torch.cat((x[:, 0::2], x[:, 1::2]), -1))


def _causal(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1)


def _attention(w: Tensors, name: str, config: dict[str, Any], x: Tensor) -> Tensor:
    heads = config["num_attention_heads"]
    query, key, value = (linear(x, w[f"{name}.{part}_proj.weight"]).chunk(heads, -1) for part in "qkv")
    size = query[0].shape[1]
    mixed = [
        _causal(_turn_halves(q) @ _turn_halves(k).T / math.sqrt(size)) @ v
        for q, k, v in zip(query, key, value, strict=True)
    ]
    return linear(torch.cat(mixed, -1), w[f"{name}.o_proj.weight"])


def _latent_attention(w: Tensors, name: str, config: dict[str, Any], x: Tensor) -> Tensor:
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    plain, rotary = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent, shared = linear(x, w[f"{name}.kv_a_proj_with_mqa.weight"]).split([rank, rotary], -1)
    latent, shared = _rms(latent, w[f"{name}.kv_a_layernorm.weight"]), _turn_pairs(shared)
    absorbed = w[f"{name}.kv_b_proj.weight"].reshape(heads, -1, rank)
    mixed = []
    for head, query in enumerate(linear(x, w[f"{name}.q_proj.weight"]).chunk(heads, -1)):
        into_key, into_value = absorbed[head, :plain], absorbed[head, plain:]
        logits = query[:, :plain] @ into_key @ latent.T + _turn_pairs(query[:, plain:]) @ shared.T
        mixed.append(_causal(logits / math.sqrt(plain + rotary)) @ latent @ into_value.T)
    return linear(torch.cat(mixed, -1), w[f"{name}.o_proj.weight"])


def _experts(w: Tensors, name: str, config: dict[str, Any], x: Tensor) -> Tensor:
    made = []
    for token in x:
        logits = w[f"{name}.gate.weight"] @ token
        scores = logits.sigmoid() if config.get("scoring_func") == "sigmoid" else logits.softmax(-1)
        bias = w.get(f"{name}.gate.e_score_correction_bias", torch.zeros(()))
        chosen = (scores + bias).topk(config["num_experts_per_tok"]).indices.tolist()
        weights = scores[chosen]
        if config.get("norm_topk_prob"):
            weights = weights / (weights.sum() + 1e-20)
        weights = weights * config.get("routed_scaling_factor", 1.0)
        routed = [g * _gated(w, f"{name}.experts.{e}", token) for e, g in zip(chosen, weights, strict=True)]
        made.append(torch.stack(routed).sum(0))
    return torch.stack(made) + _gated(w, f"{name}.shared_experts", x)
