"""InternVL's original checkpoints on the native classes: names, the fused projections, the config; no remote code.

Facts: the originals' modeling_internvl_chat.py, modeling_internlm2.py and modeling_intern_vit.py in
https://github.com/OpenGVLab/InternVL (internvl_chat/internvl/model), and convert_internvl_weights_to_hf.py in
https://github.com/huggingface/transformers @ 015d3b2. Nothing is copied. docs/checkpoints lists every name.

InternLM2 is Llama under other names, but for ``wqkv``: its rows are, for each key/value head, the query heads that
share it, then the key head, then the value head. InternViT fuses the three plainly, queries first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_adapters._checkpoint import whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Patterns are tried in order on whole names; the first that matches names the tensor.
_LANGUAGE = {
    r"model\.tok_embeddings\.weight": "model.embed_tokens.weight",
    r"output\.weight": "lm_head.weight",
    r"model\.layers\.(\d+)\.attention\.wo\.(weight|bias)": r"model.layers.\1.self_attn.o_proj.\2",
    r"model\.layers\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"model\.layers\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"model\.layers\.(\d+)\.feed_forward\.w1\.weight": r"model.layers.\1.mlp.gate_proj.weight",
    r"model\.layers\.(\d+)\.feed_forward\.w2\.weight": r"model.layers.\1.mlp.down_proj.weight",
    r"model\.layers\.(\d+)\.feed_forward\.w3\.weight": r"model.layers.\1.mlp.up_proj.weight",
    r"(model\.norm\.weight)": r"\1",
    # Qwen2 has its native names already.
    r"(lm_head\.weight|model\.embed_tokens\.weight)": r"\1",
    r"(model\.layers\.\d+\.(?:self_attn|mlp|input_layernorm|post_attention_layernorm)\..*)": r"\1",
}
_FUSED_LANGUAGE = re.compile(r"model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)")
_VISION = {
    r"embeddings\.class_embedding": "embeddings.cls_token",
    r"embeddings\.position_embedding": "embeddings.position_embeddings",
    r"embeddings\.patch_embedding\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"encoder\.layers\.(\d+)\.ls([12])": r"encoder.layer.\1.lambda_\2",
    r"encoder\.layers\.(\d+)\.norm1\.(weight|bias)": r"encoder.layer.\1.layernorm_before.\2",
    r"encoder\.layers\.(\d+)\.norm2\.(weight|bias)": r"encoder.layer.\1.layernorm_after.\2",
    r"encoder\.layers\.(\d+)\.attn\.proj\.(weight|bias)": r"encoder.layer.\1.attention.projection_layer.\2",
    r"encoder\.layers\.(\d+)\.attn\.([qk]_norm)\.weight": r"encoder.layer.\1.attention.\2.weight",
    r"encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(weight|bias)": r"encoder.layer.\1.mlp.\2.\3",
}
_FUSED_VISION = re.compile(r"encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)")
_PROJECTOR = {
    r"0\.(weight|bias)": r"layer_norm.\1",
    r"1\.(weight|bias)": r"linear_1.\1",
    r"3\.(weight|bias)": r"linear_2.\1",
}
_LANGUAGES = {"InternLM2ForCausalLM": "llama", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
# The tokenizers' placeholder, where added_tokens.json does not say.
_IMAGE_TOKEN = {"llama": 92546, "qwen2": 151667}
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "use_sliding_window", "sliding_window"),
    *("max_window_layers", "rope_theta"),
)


def is_original(folder: Path) -> bool:
    """Whether a checkpoint folder has the original layout (``model_type`` internvl_chat) and not the native one."""
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == "internvl_chat"


def added_tokens(folder: Path) -> dict[str, int]:
    """Ids of the tokens that were added to the vocabulary: <IMG_CONTEXT>, <|im_end|>, ..."""
    simple, full = folder / "added_tokens.json", folder / "tokenizer_config.json"
    tokens: dict[str, int] = json.loads(simple.read_text()) if simple.is_file() else {}
    if full.is_file():
        decoder = json.loads(full.read_text()).get("added_tokens_decoder", {})
        tokens |= {entry["content"]: int(number) for number, entry in decoder.items()}
    return tokens


def native_config(original: Mapping[str, Any], tokens: Mapping[str, int], tied: bool = False) -> Any:
    """``InternVLConfig`` of an original config.json.

    Args:
        original: the parsed file. tokens: `added_tokens`. tied: whether the checkpoint has no output matrix of its own.

    Raises:
        ValueError: a language model or pixel shuffle that the native classes do not have.
    """
    from transformers import InternVLConfig

    if original.get("ps_version", "v1") != "v2":
        raise ValueError(
            f"ps_version {original.get('ps_version')!r}: the native InternVL class shuffles pixels as 'v2' only, "
            "which InternVL2 and later use"
        )
    language, vision = original["llm_config"], original["vision_config"]
    kind = _LANGUAGES.get(language["architectures"][0])
    if kind is None:
        raise ValueError(
            f"language model {language['architectures'][0]!r} of an InternVL checkpoint is not known; known are "
            f"{', '.join(sorted(_LANGUAGES))}. Use the checkpoint's `-hf` conversion if there is one."
        )
    text = {key: language[key] for key in _TEXT_KEYS if key in language} | {"model_type": kind}
    if language.get("rope_scaling"):
        scaling = dict(language["rope_scaling"])
        scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
        text["rope_parameters"] = {"rope_theta": text.pop("rope_theta", 10000.0), **scaling}
    if kind == "llama":
        text["attention_bias"] = bool(language.get("bias", language.get("attention_bias", False)))
    size, patch = original.get("force_image_size") or vision["image_size"], vision["patch_size"]
    return InternVLConfig(
        text_config=text | {"tie_word_embeddings": tied},
        vision_config={
            "hidden_size": vision["hidden_size"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "num_attention_heads": vision["num_attention_heads"],
            "intermediate_size": vision["intermediate_size"],
            "hidden_act": vision.get("hidden_act", "gelu"),
            "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
            # Defaults of the original configuration_intern_vit.py, which are those of the 6B tower.
            "norm_type": vision.get("norm_type", "rms_norm"),
            "use_qk_norm": vision.get("qk_normalization", True),
            "attention_bias": vision.get("qkv_bias", False),
            "image_size": [size, size],
            "patch_size": [patch, patch],
        },
        image_token_id=tokens.get("<IMG_CONTEXT>", _IMAGE_TOKEN[kind]),
        image_seq_length=int((size // patch) ** 2 * original["downsample_ratio"] ** 2),
        downsample_ratio=original["downsample_ratio"],
        vision_feature_layer=original.get("select_layer", -1),
        tie_word_embeddings=tied,
    )


def native_tensors(name: str, tensor: Tensor, n_heads: int, n_kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    """A tensor of an original checkpoint under the names of ``InternVLForConditionalGeneration``.

    Raises:
        ValueError: a name that no InternVL checkpoint is known to have.
    """
    part, _, rest = name.partition(".")
    if part == "language_model":
        for native, value in language_tensors(rest, tensor, n_heads, n_kv_heads):
            prefix = "" if native == "lm_head.weight" else "model.language_model."
            yield prefix + native.removeprefix("model."), value
    elif part == "mlp1":
        yield f"model.multi_modal_projector.{_renamed(rest, _PROJECTOR, 'projector')}", tensor
    elif part == "vision_model" and (fused := _FUSED_VISION.fullmatch(rest)):
        layer, kind = fused.groups()
        for signal, value in zip("qkv", tensor.chunk(3), strict=True):
            yield f"model.vision_tower.encoder.layer.{layer}.attention.{signal}_proj.{kind}", value.contiguous()
    elif part == "vision_model":
        yield f"model.vision_tower.{_renamed(rest, _VISION, 'vision tower')}", tensor
    else:
        raise ValueError(f"tensor {name!r} belongs to no known part of an InternVL checkpoint; see docs/checkpoints")


def language_tensors(name: str, tensor: Tensor, n_heads: int, n_kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    """A tensor of an InternLM2 or Qwen2 language model under the native names of Llama or Qwen2.

    Args:
        name: without the ``language_model.`` of the whole model.
        tensor: for ``wqkv``: ((H + 2 G) D, E) weight or ((H + 2 G) D,) bias.
        n_heads, n_kv_heads: H and G.

    Raises:
        ValueError: an unknown name, or a ``wqkv`` whose rows do not fit H and G.
    """
    fused = _FUSED_LANGUAGE.fullmatch(name)
    if fused is None:
        yield _renamed(name, _LANGUAGE, "language model"), tensor
        return
    layer, kind = fused.groups()
    if tensor.shape[0] % (n_heads + 2 * n_kv_heads):
        raise ValueError(f"{name} has {tensor.shape[0]} rows, which {n_heads} + 2 * {n_kv_heads} heads do not divide")
    shared = n_heads // n_kv_heads
    groups = tensor.unflatten(0, (n_kv_heads, shared + 2, -1))  # (G, H / G + 2, D, ...)
    parts = {"q": groups[:, :shared].flatten(0, 2), "k": groups[:, -2].flatten(0, 1), "v": groups[:, -1].flatten(0, 1)}
    for part, value in parts.items():
        yield f"model.layers.{layer}.self_attn.{part}_proj.{kind}", value.contiguous()


def _renamed(name: str, patterns: dict[str, str], part: str) -> str:
    for pattern, native in patterns.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(native)
    raise ValueError(f"tensor {name!r} is none that InternVL's {part} is known to have; see docs/checkpoints")


def load_model(folder: Path, dtype: torch.dtype, attention: str, **placement: Any) -> Any:
    """The native model with the weights of an original checkpoint; nothing of the folder is executed.

    Args:
        placement: e.g. ``device_map="auto"`` or ``quantization_config``, handed to transformers.

    Raises:
        ValueError: tensors that are unknown, missing or of the wrong shape.
    """
    from transformers import InternVLForConditionalGeneration

    original, tokens = json.loads((folder / "config.json").read_text()), added_tokens(folder)
    tensors = dict(_read(folder))
    tied = not {"language_model.output.weight", "language_model.lm_head.weight"} & tensors.keys()
    config = native_config(original, tokens, tied)
    heads = config.text_config.num_attention_heads, config.text_config.num_key_value_heads
    state: dict[str, Tensor] = {}
    for name in list(tensors):
        state.update(native_tensors(name, tensors.pop(name), *heads))
    model, report = InternVLForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        **placement,
    )
    whole(str(folder), report)
    end = tokens.get("<|im_end|>")
    if end is not None:
        model.generation_config.eos_token_id = end  # the originals' chat() stops there; the config says </s>
    return model


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder's safetensors files, mapped, not copied."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in sorted(names):
        with safe_open(str(folder / name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                yield key, file.get_tensor(key)
