"""The smallest checkpoints in DeepSeek-VL2's published layout: config.json keys, tensor names, shards, tokenizer.

Sizes are shrunk; the keys of the configuration, and which of them are left to the release's defaults, are those of
the published files (docs/checkpoints/deepseek_vl2.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VARIANTS = ("small", "tiny", "27b")
WIDTH, TOWER_LAYERS, HEADS, PATCH = 32, 2, 16, 14
IMAGE_SIZE = 70  # 5 x 5 patches, 3 x 3 tokens: odd, as 27 x 27 and 14 x 14
HIDDEN, LAYERS, EXPERTS = 48, 3, 4
RESOLUTIONS = [[70, 70], [70, 140], [140, 70], [140, 140], [210, 70], [70, 210], [210, 140]]
VOCABULARY = 512
IMAGE, PAD, BOS, EOS = 500, 2, 0, 1

_LANGUAGE: dict[str, dict[str, Any]] = {
    "small": {  # latent attention, softmax gate; use_mla and scoring_func are left to the defaults
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "topk_method": "greedy",
        "lm_head": True,
    },
    "tiny": {  # multi-head attention
        "kv_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "v_head_dim": 0,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "topk_method": "greedy",
        "use_mla": False,
        "lm_head": True,
    },
    "27b": {  # latent attention, sigmoid gate with a selection bias
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
        "lm_head": False,
    },
}


def config(variant: str) -> dict[str, Any]:
    """config.json."""
    return {
        "candidate_resolutions": RESOLUTIONS,
        "global_view_pos": "head",
        "image_token_id": IMAGE,  # published files leave it to the tokenizer; the tiny vocabulary has another
        "language_config": {
            "architectures": ["DeepseekV2ForCausalLM"],
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "first_k_dense_replace": 1,
            "hidden_size": HIDDEN,
            "intermediate_size": 40,
            "max_position_embeddings": 4096,
            "model_type": "deepseek_v2",
            "moe_intermediate_size": 20,
            "n_group": 1,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "num_hidden_layers": LAYERS,
            "q_lora_rank": None,
            "rm_head": False,
            "topk_group": 1,
            "torch_dtype": "bfloat16",
            "vocab_size": VOCABULARY,
            **_LANGUAGE[variant],
        },
        "model_type": "deepseek_vl_v2",
        "projector_config": {"model_type": "mlp_projector", "n_embed": HIDDEN, "input_dim": WIDTH},
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.2",
        "vision_config": {
            "layers": TOWER_LAYERS,
            "mlp_ratio": 1.7362,
            "model_name": "siglip_so400m_patch14_384",
            "model_type": "vision",
            "patch_size": PATCH,
            "width": WIDTH,
            "image_size": IMAGE_SIZE,
        },
    }


def shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Every tensor name of the published index, with its shape."""
    made = {**_vision_shapes(), "image_newline": (HIDDEN,), "view_seperator": (HIDDEN,)}
    made |= _linear("projector.layers.0", WIDTH * 4, HIDDEN) | _linear("projector.layers.2", HIDDEN, HIDDEN)
    return made | {f"language.{name}": shape for name, shape in _language_shapes(variant).items()}


def _linear(name: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}


def _norm(name: str, size: int = WIDTH) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _vision_shapes() -> dict[str, tuple[int, ...]]:
    hidden = int(WIDTH * 1.7362)
    made: dict[str, tuple[int, ...]] = {
        "vision.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "vision.patch_embed.proj.bias": (WIDTH,),
        "vision.pos_embed": (1, (IMAGE_SIZE // PATCH) ** 2, WIDTH),
        "vision.attn_pool.latent": (1, 1, WIDTH),
        **_norm("vision.norm"),
        **_norm("vision.attn_pool.norm"),
        **_linear("vision.attn_pool.q", WIDTH, WIDTH),
        **_linear("vision.attn_pool.kv", WIDTH, 2 * WIDTH),
        **_linear("vision.attn_pool.proj", WIDTH, WIDTH),
        **_linear("vision.attn_pool.mlp.fc1", WIDTH, hidden),
        **_linear("vision.attn_pool.mlp.fc2", hidden, WIDTH),
    }
    for index in range(TOWER_LAYERS):
        block = f"vision.blocks.{index}"
        made |= _norm(f"{block}.norm1") | _norm(f"{block}.norm2")
        made |= _linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH) | _linear(f"{block}.attn.proj", WIDTH, WIDTH)
        made |= _linear(f"{block}.mlp.fc1", WIDTH, hidden) | _linear(f"{block}.mlp.fc2", hidden, WIDTH)
    return made


def _language_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    language = config(variant)["language_config"]
    heads, rank = language["num_attention_heads"], language["kv_lora_rank"]
    nope, rope, value = (language[f"{key}_head_dim"] for key in ("qk_nope", "qk_rope", "v"))
    made: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        made |= {f"{layer}.input_layernorm.weight": (HIDDEN,), f"{layer}.post_attention_layernorm.weight": (HIDDEN,)}
        if variant == "tiny":
            made |= {f"{attention}.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        else:
            made |= {
                f"{attention}.q_proj.weight": (heads * (nope + rope), HIDDEN),
                f"{attention}.kv_a_proj_with_mqa.weight": (rank + rope, HIDDEN),
                f"{attention}.kv_a_layernorm.weight": (rank,),
                f"{attention}.kv_b_proj.weight": (heads * (nope + value), rank),
                f"{attention}.o_proj.weight": (HIDDEN, heads * value),
            }
        if index == 0:
            made |= _gated(mlp, language["intermediate_size"])
            continue
        made[f"{mlp}.gate.weight"] = (EXPERTS, HIDDEN)
        if variant == "27b":
            made[f"{mlp}.gate.e_score_correction_bias"] = (EXPERTS,)
        made |= _gated(f"{mlp}.shared_experts", 2 * language["moe_intermediate_size"])
        for expert in range(EXPERTS):
            made |= _gated(f"{mlp}.experts.{expert}", language["moe_intermediate_size"])
    return made


def _gated(name: str, width: int) -> dict[str, tuple[int, ...]]:
    into, out = (width, HIDDEN), (HIDDEN, width)
    return {f"{name}.gate_proj.weight": into, f"{name}.up_proj.weight": into, f"{name}.down_proj.weight": out}


def tensors(variant: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the published names, large enough for attention and routing to matter."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in sorted(shapes(variant).items()):
        noise = torch.randn(shape, generator=generator)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        small = len(shape) == 1 or "pos_embed" in name or "latent" in name
        made[name] = centre + noise * (0.2 if small else 1.5 / (noise[0].numel() ** 0.5))
    made["image_newline"] *= 5
    made["view_seperator"] *= 5
    return made


def write(folder: Path, variant: str, weights: dict[str, Tensor]) -> Path:
    """A checkpoint folder with three shards and their index; no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(variant), indent=2))
    names = sorted(weights)
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-000003.safetensors"
        part = {name: weights[name] for name in names[shard::3]}  # an expert's three matrices fall into three files
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
