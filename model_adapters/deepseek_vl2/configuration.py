"""Configuration of DeepSeek-VL2: the published ``config.json`` read into native sub-configurations.

The published files leave out whatever equals the defaults of the release's own configuration classes, which differ
from those of transformers (30 decoder layers against 32, for one), so those defaults are repeated here.

Facts: https://github.com/deepseek-ai/DeepSeek-VL2 @ ef9f91e, models/configuration_deepseek.py and
models/modeling_deepseek_vl_v2.py. What is known of each checkpoint: docs/checkpoints/deepseek_vl2.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig

LANGUAGE_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "gready",  # as the release spells it: a configuration must name its method
    "n_group": None,
    "topk_group": None,
    "num_experts_per_tok": None,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_mla": True,
    "ep_size": 1,
}
VISION_DEFAULTS: Mapping[str, Any] = {
    "image_size": 384,
    "patch_size": 16,
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "mlp_ratio": 4,
    "ignore_head": True,
    "class_token": False,
}
PROJECTOR_DEFAULTS: Mapping[str, Any] = {
    "projector_type": "downsample_mlp_gelu",
    "input_dim": 1152,
    "n_embed": 2048,
    "depth": 2,
    "mlp_ratio": 1,
    "downsample_ratio": 2,
    "token_pooling": False,
}
IMAGE_TOKEN_IDS: Mapping[int, int] = {102400: 100003, 129280: 128815}
"""``<image>`` by vocabulary size: small | tiny and 27B. The published files do not say; the tokenizers do."""

_MLA = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim")
_CHOICES = ("use_mla", "scoring_func", "topk_method", "norm_topk_prob", "first_k_dense_replace", "moe_layer_freq")
_NOT_EVERYWHERE = frozenset((*_MLA, *_CHOICES, "ep_size", "rope_scaling"))


class DeepseekVL2Config(PreTrainedConfig):
    """Configuration of `DeepseekVL2ForConditionalGeneration`.

    Reads the published layout (``language_config``, timm-like ``vision_config``, ``projector_config``) and its own.

    Args:
        text_config: native configuration of the language model; see `native_text_config`.
        vision_config: `SiglipVisionConfig` without its pooling head, which the release never runs.
        projector_config: keys as in `PROJECTOR_DEFAULTS`.
        tile_tag: "2D", the only token layout the release uses.
        global_view_pos: "head" puts the thumbnail before the tiles; anything else after them.
        candidate_resolutions: (width, height) in pixels of the tiled views that the processor may choose.
        image_token_id: of ``<image>``; None takes the one known for the vocabulary size.

    Raises:
        ValueError: a variant that is not implemented, with what was got and what is.
    """

    model_type = "deepseek_vl_v2"
    has_no_defaults_at_init = True  # older releases of transformers would otherwise build one without arguments
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": AutoConfig}  # noqa: RUF012 (as the base class)

    vision_config: Any = None
    text_config: Any = None
    projector_config: Any = None
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: list | tuple = ((384, 384),)
    image_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, language_config: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if language_config is not None:
            self.text_config = native_text_config(language_config)
        elif isinstance(self.text_config, Mapping):
            self.text_config = AutoConfig.for_model(**self.text_config)
        if self.text_config is None:
            raise ValueError("config.json has no language_config (published layout) and no text_config (ours)")
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = _vision_config(self.vision_config or {})
        self.projector_config = {**PROJECTOR_DEFAULTS, **(self.projector_config or {})}
        super().__post_init__(**kwargs)
        if self.image_token_id is None:
            self.image_token_id = IMAGE_TOKEN_IDS.get(self.text_config.vocab_size)
        self._check()

    def _check(self) -> None:
        projector, vision, text = self.projector_config, self.vision_config, self.text_config
        if self.tile_tag != "2D":
            raise ValueError(f"tile_tag {self.tile_tag!r} is not implemented; every published checkpoint has '2D'")
        if projector["projector_type"] != "downsample_mlp_gelu" or projector["token_pooling"]:
            raise ValueError(
                f"projector {projector} is not implemented: DeepSeek-VL2 has projector_type 'downsample_mlp_gelu' "
                "without token_pooling. DeepSeek-OCR shares the model_type but is another model."
            )
        if (projector["input_dim"], projector["n_embed"]) != (vision.hidden_size, text.hidden_size):
            raise ValueError(
                f"the projector maps {projector['input_dim']} to {projector['n_embed']} dimensions, the vision tower "
                f"has {vision.hidden_size} and the language model {text.hidden_size}"
            )

    @property
    def view_side(self) -> int:
        """g: each view of ``image_size`` pixels becomes g x g tokens (14 as published)."""
        patches = self.vision_config.image_size // self.vision_config.patch_size
        return -(-patches // self.projector_config["downsample_ratio"])


def _vision_config(given: Mapping[str, Any]) -> SiglipVisionConfig:
    ours = given.get("model_type") == "siglip_vision_model"
    return SiglipVisionConfig(**given) if ours else native_vision_config(given)


def native_vision_config(published: Mapping[str, Any]) -> SiglipVisionConfig:
    """The SigLIP tower of a published ``vision_config`` (keys as in `VISION_DEFAULTS`).

    Raises:
        ValueError: a tower other than the published one.
    """
    vision = {**VISION_DEFAULTS, **published}
    if isinstance(vision["width"], Mapping):
        raise ValueError("vision_config describes DeepSeek-OCR's two towers, not the SigLIP tower of DeepSeek-VL2")
    if vision["class_token"] or not vision["ignore_head"]:
        raise ValueError("a vision tower with class_token, or without ignore_head, is not implemented")
    return SiglipVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        vision_use_head=False,
    )


def native_text_config(published: Mapping[str, Any]) -> PreTrainedConfig:
    """The native configuration that computes what the release computes for a published ``language_config``.

    * latent attention, softmax gate, greedy or group-limited top-k (vl2-small): ``DeepseekV2``;
    * plain multi-head attention, softmax gate, greedy top-k (vl2-tiny): the text model of ``DeepseekOcr2``, which is
      DeepseekV2 with Llama's attention;
    * latent attention, sigmoid gate with a selection bias ("noaux_tc", the 27B vl2): ``DeepseekV3``.

    Raises:
        ValueError: any other combination; nothing is approximated.
    """
    language = {**LANGUAGE_DEFAULTS, **published}
    _refuse_unknown_language(language)
    common = {key: language[key] for key in LANGUAGE_DEFAULTS if key not in _NOT_EVERYWHERE}
    gate = (language["scoring_func"], language["topk_method"])
    normalised = bool(language["norm_topk_prob"])
    if language["use_mla"] and gate in (("softmax", "greedy"), ("softmax", "group_limited_greedy")) and not normalised:
        from transformers import DeepseekV2Config

        dense = language["first_k_dense_replace"]
        mla = {key: language[key] for key in _MLA}
        return DeepseekV2Config(**common, **mla, topk_method=gate[1], first_k_dense_replace=dense)
    if language["use_mla"] and gate == ("sigmoid", "noaux_tc"):
        from transformers import DeepseekV3Config

        return DeepseekV3Config(
            **common,
            **{key: language[key] for key in _MLA},
            first_k_dense_replace=language["first_k_dense_replace"],
            norm_topk_prob=normalised,
            rope_interleave=True,
            num_mtp_layers=0,
        )
    if not language["use_mla"] and gate == ("softmax", "greedy") and not normalised:
        return _multi_head_config(language, common)
    raise ValueError(
        f"language_config with use_mla={language['use_mla']}, scoring_func={gate[0]!r}, topk_method={gate[1]!r}, "
        f"norm_topk_prob={normalised} is not implemented. Implemented: latent attention with softmax and 'greedy' or "
        "'group_limited_greedy', or with sigmoid and 'noaux_tc'; multi-head attention with softmax and 'greedy'."
    )


def _multi_head_config(language: Mapping[str, Any], common: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
    except ImportError as error:
        raise ValueError(
            "DeepSeek-VL2-tiny (use_mla false) needs a transformers release that has deepseek_ocr2, such as 5.23"
        ) from error
    dense = language["first_k_dense_replace"]
    layers = language["num_hidden_layers"]
    kinds = ["dense" if layer < dense else "sparse" for layer in range(layers)]
    return DeepseekOcr2TextConfig(**common, topk_method="greedy", mlp_layer_types=kinds)


def _refuse_unknown_language(language: Mapping[str, Any]) -> None:
    required = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok")
    problems = [f"{key} is missing (a dense model)" for key in required if language[key] is None]
    expected = {"moe_layer_freq": 1, "ep_size": 1, "rope_scaling": None}
    problems += [f"{key} is {language[key]!r}" for key, value in expected.items() if language[key] != value]
    if language["topk_method"] == "noaux_tc" and language["n_group"] != language["topk_group"]:
        # The release sets the scores of other groups to 0, DeepseekV3 to -inf: the same only where none is excluded.
        problems.append(f"topk_method 'noaux_tc' leaves out {language['n_group']} - {language['topk_group']} groups")
    if problems:
        raise ValueError(f"language_config is not implemented: {'; '.join(problems)}. No published checkpoint has that")
