"""Native families: a checkpoint with the hub's tensor names and 4.x-era config keys loads as the model it is.

The tiny model of each family is the independent path: its tensors are written under the published names, and the
adapter must give the same logits after reading them back. Where names and keys were seen: docs/checkpoints/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from ivcp_eval.interface.registry import adapter, family_of
from tests.engine import tiny_models
from tests.model_adapters import published_layout

Renames = Iterable[tuple[str, str]]

# Prefix in transformers 5 -> prefix on the hub; the first that fits counts.
QWEN: Renames = (("model.language_model.", "model."), ("model.visual.", "visual."))
LLAVA: Renames = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.", ""),
)
INTERNVL: Renames = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", ""),
)

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 512,
}
ERA = {"torch_dtype": "bfloat16", "transformers_version": "4.41.2"}
QWEN_TEXT = SIZES | {
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_start_token_id": 501,
    "vision_end_token_id": 502,
    "vision_token_id": 505,
    "image_token_id": 503,
    "video_token_id": 504,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "model_type": "clip_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "projection_dim": 16,
    "vocab_size": 64,
}
LLAMA_TEXT = SIZES | {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": QWEN_TEXT
    | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_chans": 3,
            "hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    },
    "qwen2_5_vl": QWEN_TEXT
    | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    },
    "qwen3_vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 503,
        "video_token_id": 504,
        "vision_start_token_id": 501,
        "vision_end_token_id": 502,
        "tie_word_embeddings": False,
        "text_config": SIZES
        | {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "head_dim": 24,
            "hidden_act": "silu",
            "model_type": "qwen3_vl_text",
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 4, 4], "rope_type": "default"},
        },
        "vision_config": {
            "deepstack_visual_indexes": [0, 1],
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 32,
            "in_channels": 3,
            "intermediate_size": 48,
            "model_type": "qwen3_vl",
            "num_heads": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": 64,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "llava": {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 503,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": LLAMA_TEXT,
        "vision_config": CLIP | {"image_size": 56},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    "llava_next": {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        "image_token_index": 503,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": LLAMA_TEXT,
        "use_image_newline_parameter": True,
        "vision_config": CLIP | {"image_size": 28},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    "llava_onevision": {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": [[42, 84], [84, 42], [84, 84]],
        "image_token_index": 503,
        "model_type": "llava_onevision",
        "projector_hidden_act": "gelu",
        "text_config": SIZES
        | {
            "_name_or_path": "Qwen/Qwen2-7B-Instruct",
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 2,
            "eos_token_id": 1,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "torch_dtype": "bfloat16",
        },
        "use_image_newline_parameter": True,
        "video_token_index": 504,
        "vision_aspect_ratio": "anyres_max_2",
        "vision_config": {
            "hidden_size": 32,
            "image_size": 42,
            "intermediate_size": 48,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "internvl": {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": 16,
        "image_token_id": 503,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": SIZES
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 2,
            "eos_token_id": 1,
            "hidden_act": "silu",
            "max_window_layers": 21,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_bias": False,
            "hidden_act": "gelu",
            "hidden_size": 32,
            "image_size": [112, 112],
            "intermediate_size": 48,
            "layer_norm_eps": 1e-06,
            "model_type": "internvl_vision",
            "norm_type": "layer_norm",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": [14, 14],
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    },
}
NAMES: dict[str, Renames] = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": (),
    "llava": LLAVA,
    "llava_next": (("model.image_newline", "image_newline"), *LLAVA),
    "llava_onevision": (("model.image_newline", "image_newline"), *LLAVA),
    "internvl": INTERNVL,
}


def published(name: str, renames: Renames) -> str:
    """The hub's name of a tensor."""
    for ours, theirs in renames:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_published_layout(family: str, tmp_path: Path) -> None:
    model, make_inputs = tiny_models.build(family, seed=3)
    weights = {published(name, NAMES[family]): tensor for name, tensor in model.state_dict().items()}
    folder = published_layout.write(tmp_path, CONFIGS[family] | ERA, weights, shards=3)
    loaded = adapter(family).load_model(  # type: ignore[attr-defined]
        str(folder), revision=None, dtype=torch.float32, device="cpu", attention="sdpa", trust_remote_code=False
    )
    assert type(loaded) is type(model)
    assert not loaded.training
    assert family_of(loaded.config.model_type) == family
    inputs = make_inputs("t5 i0 t9", "t4 i1 t3 i1 t6", "t12")
    with torch.no_grad():
        published_layout.close(loaded(**inputs).logits, model(**inputs).logits)


def test_the_published_names_are_those_of_the_recorded_checkpoints() -> None:
    """The recorded 4.51 checkpoints have no name that the tables above do not produce."""
    for family in ("llava", "qwen2_5_vl"):
        from safetensors import safe_open

        folder = Path(__file__).parents[1] / "engine" / "oracle" / "data" / family / "model_seed0"
        with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
            recorded = set(file.keys())
        model = tiny_models.build(family, seed=3)[0]
        ours = {published(name, NAMES[family]) for name in model.state_dict()}
        layers = json.loads((folder / "config.json").read_text())
        depth = layers.get("text_config", layers)["num_hidden_layers"]
        below = {name for name in ours if not any(f"layers.{i}." in name for i in range(depth, 10))}
        vision = {name for name in recorded if "vision_tower" in name or "visual" in name}
        assert {n for n in below if "vision" not in n and "visual" not in n} == recorded - vision
        assert vision <= ours


def test_every_native_family_is_here() -> None:
    from ivcp_eval.interface.registry import family_names

    made_here = {"qwen2_5_vl_points", "qwen2_5_vl_uhd"}  # and published nowhere
    assert set(CONFIGS) == set(family_names()) - {"deepseek_vl2"} - made_here  # the first is not native
