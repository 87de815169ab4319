"""InternVL's original checkpoints, InternLM2- and Qwen2-based: loaded natively, held to a literal reimplementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.interface.registry import adapter
from model_adapters._internvl_checkpoint import is_original, native_config, native_tensors
from tests.model_adapters import published_layout

E, H, G, D, LAYERS, VOCABULARY = 64, 4, 2, 16, 3, 300  # of the language model
VE, VH, V_LAYERS, PATCH, SIZE = 32, 2, 2, 14, 56  # of the tower: 4 x 4 patches, 2 x 2 tokens
IMAGE, END_OF_TURN = 290, 291


def internlm2_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (VOCABULARY, E),
        "model.norm.weight": (E,),
        "output.weight": (VOCABULARY, E),
    }
    for i in range(LAYERS):
        layer = {
            "attention.wqkv.weight": ((H + 2 * G) * D, E),
            "attention.wo.weight": (E, H * D),
            "attention_norm.weight": (E,),
            "ffn_norm.weight": (E,),
            "feed_forward.w1.weight": (96, E),
            "feed_forward.w2.weight": (E, 96),
            "feed_forward.w3.weight": (96, E),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def qwen2_shapes(tied: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, E),
        "model.norm.weight": (E,),
    } | ({} if tied else {"lm_head.weight": (VOCABULARY, E)})
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (E,),
            "post_attention_layernorm.weight": (E,),
            "mlp.gate_proj.weight": (96, E),
            "mlp.up_proj.weight": (96, E),
            "mlp.down_proj.weight": (E, 96),
            "self_attn.o_proj.weight": (E, H * D),
        }
        for signal, heads in (("q", H), ("k", G), ("v", G)):
            layer |= {f"self_attn.{signal}_proj.weight": (heads * D, E), f"self_attn.{signal}_proj.bias": (heads * D,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def shapes(language: dict[str, tuple[int, ...]], large_tower: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint; the 6B tower has RMS norms, normed queries and keys and no qkv bias."""
    made: dict[str, tuple[int, ...]] = {f"language_model.{name}": shape for name, shape in language.items()}
    made |= {"mlp1.0.weight": (4 * VE,), "mlp1.0.bias": (4 * VE,), "mlp1.1.weight": (E, 4 * VE), "mlp1.1.bias": (E,)}
    made |= {"mlp1.3.weight": (E, E), "mlp1.3.bias": (E,)}
    made["vision_model.embeddings.class_embedding"] = (1, 1, VE)
    made["vision_model.embeddings.position_embedding"] = (1, (SIZE // PATCH) ** 2 + 1, VE)
    made["vision_model.embeddings.patch_embedding.weight"] = (VE, 3, PATCH, PATCH)
    made["vision_model.embeddings.patch_embedding.bias"] = (VE,)
    for i in range(V_LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "ls1": (VE,),
            "ls2": (VE,),
            "norm1.weight": (VE,),
            "norm2.weight": (VE,),
            "attn.qkv.weight": (3 * VE, VE),
            "attn.proj.weight": (VE, VE),
            "attn.proj.bias": (VE,),
            "mlp.fc1.weight": (48, VE),
            "mlp.fc1.bias": (48,),
            "mlp.fc2.weight": (VE, 48),
            "mlp.fc2.bias": (VE,),
        }
        if large_tower:
            layer |= {"attn.q_norm.weight": (VE,), "attn.k_norm.weight": (VE,)}
        else:
            layer |= {"norm1.bias": (VE,), "norm2.bias": (VE,), "attn.qkv.bias": (3 * VE,)}
        made |= {f"vision_model.encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return made


def config(language: str, large_tower: bool) -> dict[str, Any]:
    """The keys of the published config.json, written by transformers 4.37."""
    common = {
        "hidden_size": E,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05 if language == "internlm2" else 1e-06,
        "rope_theta": 1000000 if language == "internlm2" else 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_bfloat16": True,
        "use_cache": True,
        "vocab_size": VOCABULARY,
        "top_k": 50,
        "is_decoder": False,
        "num_beams": 1,
        "transformers_version": "4.37.2",
    }
    llm = {
        "internlm2": {
            "_name_or_path": "internlm/internlm2_5-7b-chat",
            "architectures": ["InternLM2ForCausalLM"],
            "attn_implementation": "flash_attention_2",
            "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
            "bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "model_type": "internlm2",
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        },
        "qwen2": {
            "_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
            "architectures": ["Qwen2ForCausalLM"],
            "_attn_implementation_autoset": True,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_window_layers": 21,
            "model_type": "qwen2",
            "rope_scaling": None,
            "sliding_window": 32768,
            "use_sliding_window": False,
        },
    }[language]
    vision: dict[str, Any] = {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "drop_path_rate": 0.1,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": VE,
        "image_size": SIZE,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-06,
        "model_type": "intern_vit_6b",
        "norm_type": "rms_norm" if large_tower else "layer_norm",
        "num_attention_heads": VH,
        "num_channels": 3,
        "num_hidden_layers": V_LAYERS,
        "patch_size": PATCH,
        "qk_normalization": large_tower,
        "qkv_bias": not large_tower,
        "use_flash_attn": True,
        "use_moe": False,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": SIZE,
        "llm_config": common | llm,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision,
    }


# -- the originals, literally ---------------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def tower(w: dict[str, Tensor], pixels: Tensor, large: bool) -> Tensor:
    """InternVisionModel without its class token: (T, 3, 56, 56) -> (T, 16, VE)."""
    patches = F.conv2d(
        pixels, w["embeddings.patch_embedding.weight"], w["embeddings.patch_embedding.bias"], stride=PATCH
    )
    x = torch.cat([w["embeddings.class_embedding"].expand(len(pixels), -1, -1), patches.flatten(2).mT], dim=1)
    x = x + w["embeddings.position_embedding"]
    for i in range(V_LAYERS):
        p = {name.split(".", 3)[3]: t for name, t in w.items() if name.startswith(f"encoder.layers.{i}.")}

        def norm(x: Tensor, name: str, p: dict[str, Tensor] = p) -> Tensor:
            if large:
                return rms(x, p[f"{name}.weight"], 1e-6)
            return F.layer_norm(x, (VE,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

        q, k, v = F.linear(norm(x, "norm1"), p["attn.qkv.weight"], p.get("attn.qkv.bias")).split(VE, dim=-1)
        if large:
            q, k = rms(q, p["attn.q_norm.weight"], 1e-6), rms(k, p["attn.k_norm.weight"], 1e-6)
        q, k, v = (t.unflatten(-1, (VH, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = ((q @ k.mT) * (VE // VH) ** -0.5).softmax(-1) @ v
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), p["attn.proj.weight"], p["attn.proj.bias"]) * p["ls1"]
        inner = F.gelu(F.linear(norm(x, "norm2"), p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
        x = x + F.linear(inner, p["mlp.fc2.weight"], p["mlp.fc2.bias"]) * p["ls2"]
    return x[:, 1:]


def connect(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Pixel shuffle 'v2' and mlp1: (T, 16, VE) -> (T, 4, E)."""
    x = x.unflatten(1, (4, 4))
    x = x.reshape(len(x), 4, 2, VE * 2).permute(0, 2, 1, 3)
    x = x.reshape(len(x), 2, 2, VE * 4).permute(0, 2, 1, 3).reshape(len(x), 4, VE * 4)
    x = F.layer_norm(x, (4 * VE,), w["0.weight"], w["0.bias"])
    return F.linear(F.gelu(F.linear(x, w["1.weight"], w["1.bias"])), w["3.weight"], w["3.bias"])


def internlm2(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """InternLM2ForCausalLM on embeddings (S, E), below the length at which dynamic NTK changes anything."""
    n = len(x)
    angles = torch.outer(torch.arange(n).float(), 1e6 ** -(torch.arange(0, D, 2).float() / D)).repeat(1, 2)
    causal = torch.full((n, n), -torch.inf).triu(1)

    def rotated(t: Tensor) -> Tensor:
        half = torch.cat((-t[..., D // 2 :], t[..., : D // 2]), -1)
        return t * angles.cos() + half * angles.sin()

    for i in range(LAYERS):
        p = {name.split(".", 3)[3]: t for name, t in w.items() if name.startswith(f"model.layers.{i}.")}
        fused = F.linear(rms(x, p["attention_norm.weight"], 1e-5), p["attention.wqkv.weight"])
        fused = fused.view(n, G, H // G + 2, D)  # 'b q (h gs d) -> b q h gs d'
        q = rotated(fused[:, :, :-2].reshape(n, H, D).transpose(0, 1))
        k = rotated(fused[:, :, -2].transpose(0, 1)).repeat_interleave(H // G, 0)
        v = fused[:, :, -1].transpose(0, 1).repeat_interleave(H // G, 0)
        mixed = (q @ k.mT / D**0.5 + causal).softmax(-1) @ v
        x = x + F.linear(mixed.transpose(0, 1).reshape(n, -1), p["attention.wo.weight"])
        y = rms(x, p["ffn_norm.weight"], 1e-5)
        gate = F.silu(F.linear(y, p["feed_forward.w1.weight"])) * F.linear(y, p["feed_forward.w3.weight"])
        x = x + F.linear(gate, p["feed_forward.w2.weight"])
    return F.linear(rms(x, w["model.norm.weight"], 1e-5), w["output.weight"])


def qwen2(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The stock Qwen2ForCausalLM, whose names the checkpoint has."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    published = config("qwen2", False)["llm_config"]
    sizes = {key: published[key] for key in (*keys, "vocab_size", "rms_norm_eps")}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    model.load_state_dict({"lm_head.weight": w["model.embed_tokens.weight"], **w})
    return model.eval()(inputs_embeds=x[None]).logits[0]


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


CASES = [("internlm2", False), ("internlm2", True), ("qwen2", False), ("qwen2-tied", True)]


@pytest.mark.parametrize(("kind", "large_tower"), CASES)
def test_original_checkpoint(kind: str, large_tower: bool, tmp_path: Path) -> None:
    language = kind.split("-")[0]
    names = internlm2_shapes() if language == "internlm2" else qwen2_shapes(tied="tied" in kind)
    weights = published_layout.draw(shapes(names, large_tower))
    folder = published_layout.write(tmp_path, config(language, large_tower), weights)
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": IMAGE, "<|im_end|>": END_OF_TURN}))
    assert is_original(folder)
    model = adapter("internvl").load_model(
        str(folder), revision=None, dtype=torch.float32, device="cpu", attention="eager"
    )
    ids = torch.tensor([5, 6, 7, *[IMAGE] * 8, 8, 9, 10, 11])
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model(input_ids=ids[None], pixel_values=pixels, attention_mask=torch.ones(1, len(ids))).logits[0]
        image = connect(part(weights, "mlp1."), tower(part(weights, "vision_model."), pixels, large_tower))
        lm = part(weights, "language_model.")
        embeddings = lm["model.tok_embeddings.weight" if language == "internlm2" else "model.embed_tokens.weight"][ids]
        embeddings[ids == IMAGE] = image.flatten(0, 1)
        published_layout.close(got, (internlm2 if language == "internlm2" else qwen2)(lm, embeddings))
    assert model.generation_config.eos_token_id == END_OF_TURN
    assert not model.training
    planned = adapter("internvl").config(str(folder))
    assert adapter("internvl").facts(planned, "internvl").n_layers == len(model.model.language_model.layers)
    assert DecoderShape.of(planned) == DecoderShape.of(model.config)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    weights = published_layout.draw(shapes(internlm2_shapes(), False))
    del weights["language_model.model.layers.1.feed_forward.w2.weight"]
    folder = published_layout.write(tmp_path, config("internlm2", False), weights)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj"):
        adapter("internvl").load_model(str(folder), revision=None, dtype=torch.float32, device="cpu", attention="eager")


@pytest.mark.parametrize(
    "name",
    ["language_model.model.layers.0.attention.wq.weight", "vision_model.head.weight", "mlp1.2.weight", "mlp2.0.bias"],
)
def test_an_unknown_tensor_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"docs/checkpoints"):
        list(native_tensors(name, torch.zeros(4), 4, 2))


def test_an_unknown_language_model_is_refused(tmp_path: Path) -> None:
    published = config("internlm2", False)
    published["llm_config"]["architectures"] = ["Phi3ForCausalLM"]
    folder = published_layout.write(tmp_path, published, published_layout.draw(shapes(internlm2_shapes(), False)))
    with pytest.raises(ValueError, match="Phi3ForCausalLM"):
        adapter("internvl").load_model(str(folder), revision=None, dtype=torch.float32, device="cpu", attention="eager")


def test_the_published_8b_index_is_covered() -> None:
    """Every name of InternVL2.5-8B's index maps onto the native model one to one, and the sizes add up to its total."""
    from transformers import InternVLForConditionalGeneration

    published = config("internlm2", False)
    published["llm_config"] |= {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 92553,
    }
    published["vision_config"] |= {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 448,
    }
    published["force_image_size"] = 448
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(native_config(published, {}))
        tiny = shapes(internlm2_shapes(), large_tower=False)
        names = [name for name in tiny if ".layers." not in name]
        for part, depth in (("language_model.model.layers.", 32), ("vision_model.encoder.layers.", 24)):
            ends = {name.removeprefix(f"{part}0.") for name in tiny if name.startswith(f"{part}0.")}
            names += [f"{part}{layer}.{end}" for layer in range(depth) for end in ends]
        native = [new for name in names for new, _ in native_tensors(name, torch.empty(48 * 3, 2), 32, 8)]
    parameters = model.state_dict()
    assert sorted(native) == sorted(parameters)
    assert len(names) == 32 * 7 + 24 * 14 + 3 + 4 + 6
    assert 2 * sum(p.numel() for p in parameters.values()) == 16150730752  # metadata.total_size, bfloat16
    assert model.config.image_seq_length == 256
    assert model.config.image_token_id == 92546
