"""Checkpoints in the published layout load without remote code and compute what the release computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.interface.registry import adapter
from model_adapters.deepseek_vl2.layout import n_tokens
from model_adapters.deepseek_vl2.modeling import DeepseekVL2ForConditionalGeneration
from tests.model_adapters.deepseek_vl2 import checkpoint as published
from tests.model_adapters.deepseek_vl2 import reference

SIDE = 3


@pytest.fixture(scope="module", params=published.VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    weights = published.tensors(request.param)
    return request.param, published.write(folder, request.param, weights), weights


def load(folder: Path, **kwargs: Any) -> Any:
    model, info = DeepseekVL2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def prompt(crops: list[tuple[int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Text, and each image with text after it, as one row."""
    generator = torch.Generator().manual_seed(seed)

    def text(n: int) -> list[int]:
        return torch.randint(10, 400, (n,), generator=generator).tolist()

    ids, views = [published.BOS, *text(3)], 0
    for crop in crops:
        ids += [published.IMAGE] * n_tokens(SIDE, crop) + text(4)
        views += 1 + crop[0] * crop[1]
    pixels = torch.randn(1, views, 3, published.IMAGE_SIZE, published.IMAGE_SIZE, generator=generator)
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels,
        "images_spatial_crop": torch.tensor([crops]),
    }


def expected_embeddings(weights: Any, inputs: dict[str, torch.Tensor], head_first: bool = True) -> torch.Tensor:
    ids, start, images = inputs["input_ids"][0], 0, []
    for w, h in inputs["images_spatial_crop"][0].tolist():
        views = inputs["pixel_values"][0, start : start + 1 + w * h]
        images.append(reference.image_tokens(weights, views, (w, h), published.HEADS, head_first))
        start += 1 + w * h
    embeds = weights["language.model.embed_tokens.weight"][ids].clone()
    embeds[ids == published.IMAGE] = torch.cat(images)
    return embeds


@pytest.mark.parametrize("crops", [[(2, 1)], [(1, 2), (2, 2)]])
def test_logits_equal_a_literal_reimplementation(checkpoint: Any, crops: list[tuple[int, int]]) -> None:
    variant, folder, weights = checkpoint
    model, inputs = load(folder, dtype=torch.float32), prompt(crops)
    with torch.no_grad():
        got = model(**inputs).logits[0]
    embeds = expected_embeddings(weights, inputs)
    expected = reference.language(weights, published.config(variant)["language_config"], embeds)
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def test_shape_of_the_decoder_without_its_weights(checkpoint: Any) -> None:
    _, folder, _ = checkpoint
    model, planned = load(folder, dtype=torch.float32), adapter("deepseek_vl2").config(str(folder))
    assert adapter("deepseek_vl2").facts(planned, "deepseek_vl2").n_layers == len(model.model.language_model.layers)
    shape = DecoderShape.of(planned)
    assert shape == DecoderShape.of(model.config)
    assert len(shape.mlps) == shape.layers
    assert len(set(shape.mlps)) == 2  # a dense first layer, then experts


def test_thumbnail_last_where_the_configuration_says_so(checkpoint: Any) -> None:
    _, folder, weights = checkpoint
    model, inputs = load(folder, dtype=torch.float32), prompt([(2, 1)])
    with torch.no_grad():
        first = model.model.get_image_features(inputs["pixel_values"], inputs["images_spatial_crop"])[0]
        model.config.global_view_pos = "tail"
        last = model.model.get_image_features(inputs["pixel_values"], inputs["images_spatial_crop"])[0]
    for got, head_first in ((first, True), (last, False)):
        image = reference.image_tokens(weights, inputs["pixel_values"][0], (2, 1), published.HEADS, head_first)
        torch.testing.assert_close(got, image, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(first, last)


def test_language_part_equals_the_native_class_loaded_alone(tmp_path: Path) -> None:
    weights = published.tensors("small")
    folder = published.write(tmp_path / "whole", "small", weights)
    language = {k.removeprefix("language."): v for k, v in weights.items() if k.startswith("language.")}
    alone = published.write(tmp_path / "alone", "small", language)
    (alone / "config.json").write_text(json.dumps(published.config("small")["language_config"]))
    native = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32).eval()
    model, inputs = load(folder, dtype=torch.float32), prompt([(1, 1)])
    with torch.no_grad():
        got = model(**inputs).logits
        expected = native(inputs_embeds=expected_embeddings(weights, inputs)[None]).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_saving_writes_the_published_names(checkpoint: Any, tmp_path: Path) -> None:
    _, folder, weights = checkpoint
    model = load(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    expected = {name: tensor for name, tensor in weights.items() if not name.startswith("vision.attn_pool.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = load(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_half_precision_keeps_the_selection_bias_in_float32(tmp_path: Path) -> None:
    model = load(published.write(tmp_path, "27b", published.tensors("27b")), dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    biases = [name for name in kinds if name.endswith("e_score_correction_bias")]
    assert biases
    assert all((kind == torch.float32) == (name in biases) for name, kind in kinds.items())


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("language_config", {"topk_method": "noaux_tc"}, "noaux_tc"),
        ("language_config", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("language_config", {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling"),
        ("language_config", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("language_config", {"n_routed_experts": None}, "n_routed_experts"),
        ("projector_config", {"projector_type": "linear"}, "DeepSeek-OCR"),
        ("projector_config", {"n_embed": 64}, "maps"),
        ("vision_config", {"ignore_head": False}, "ignore_head"),
        ("vision_config", {"width": {"clip": {}}}, "DeepSeek-OCR"),
    ],
)
def test_other_variants_are_refused(part: str, changes: dict[str, Any], message: str) -> None:
    config = published.config("small")
    config[part] |= changes
    with pytest.raises(ValueError, match=message):
        DeepseekVL2ForConditionalGeneration.config_class.from_dict(config)


def test_one_dimensional_tile_tags_are_refused() -> None:
    with pytest.raises(ValueError, match="tile_tag"):
        DeepseekVL2ForConditionalGeneration.config_class.from_dict({**published.config("small"), "tile_tag": "1D"})


PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 102400,
    },
    "tiny": {
        "hidden_size": 1280,
        "intermediate_size": 6848,
        "moe_intermediate_size": 896,
        "n_routed_experts": 64,
        "num_attention_heads": 10,
        "num_hidden_layers": 12,
        "num_key_value_heads": 10,
        "vocab_size": 129280,
    },
    "27b": {
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 72,
        "num_attention_heads": 32,
        "num_hidden_layers": 30,
        "num_key_value_heads": 32,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}


@pytest.mark.parametrize(("variant", "billions"), [("tiny", 3.37), ("small", 16.15), ("27b", 27.48)])
def test_published_sizes_have_the_published_number_of_parameters(variant: str, billions: float) -> None:
    """3.37, 16.1 and 27.5 billion (README of the release), the tower's unused pooling head included."""
    config = published.config(variant)
    config["language_config"] |= {**PUBLISHED_SIZES[variant], "num_experts_per_tok": 6}
    config["projector_config"] = {"model_type": "mlp_projector", "n_embed": PUBLISHED_SIZES[variant]["hidden_size"]}
    config["vision_config"] = {
        "layers": 27,
        "mlp_ratio": 3.7362,
        "model_type": "vision",
        "patch_size": 14,
        "width": 1152,
    }
    with torch.device("meta"):
        model = DeepseekVL2ForConditionalGeneration(DeepseekVL2ForConditionalGeneration.config_class.from_dict(config))
    width, hidden = 1152, 4304
    pooling = 4 * width * (width + 1) + 2 * width * hidden + hidden + width + 3 * width
    assert (sum(p.numel() for p in model.parameters()) + pooling) / 1e9 == pytest.approx(billions, abs=0.005)


def test_what_published_configurations_leave_out() -> None:
    config = published.config("27b")
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "kv_lora_rank"):
        del config["language_config"][key]
    for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        del config["language_config"][key]
    del config["image_token_id"]
    config["language_config"] |= {"hidden_size": 2560, "vocab_size": 129280}
    config["projector_config"] = {"model_type": "mlp_projector", "n_embed": 2560}
    config["vision_config"] = {
        "layers": 27,
        "mlp_ratio": 3.7362,
        "model_type": "vision",
        "patch_size": 14,
        "width": 1152,
    }
    made = DeepseekVL2ForConditionalGeneration.config_class.from_dict(config)
    text, vision = made.text_config, made.vision_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.kv_lora_rank, text.q_lora_rank) == (
        30,
        32,
        512,
        None,
    )
    assert (text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim) == (128, 64, 128)
    assert (vision.image_size, vision.num_attention_heads, vision.intermediate_size) == (384, 16, 4304)
    assert (made.view_side, made.image_token_id) == (14, 128815)
