"""Names of the published tensors, and where each goes in `DeepseekVL2ForConditionalGeneration`.

Where the names were seen, and every name this must cover: docs/checkpoints/deepseek_vl2.md.
"""

from __future__ import annotations

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

_TOWER = "model.vision_tower"
_RENAMED = (
    (r"^vision\.patch_embed\.proj\.", f"{_TOWER}.embeddings.patch_embedding."),
    (r"^vision\.blocks\.", f"{_TOWER}.encoder.layers."),
    (r"^vision\.norm\.", f"{_TOWER}.post_layernorm."),
    (r"^projector\.", "model.projector."),
    (r"^image_newline", "model.layout.newline"),
    (r"^view_seperator", "model.layout.separator"),  # sic
    (r"^language\.model\.", "model.language_model."),
    (r"^language\.lm_head\.", "lm_head."),
)
_RENAMED_IN_TOWER = (
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.norm1\.", ".layer_norm1."),
    (r"\.norm2\.", ".layer_norm2."),
)


def weight_names() -> list[WeightTransform]:
    """The transforms from published to native names, in the order transformers applies them.

    The language model's own (experts joined into one tensor per layer) are known to transformers and repeated only
    because transformers must find them under the root model, too.
    """
    renamed = [WeightRenaming(old, f"^{new}" if old.startswith("^") else new) for old, new in _RENAMED]
    in_tower: list[WeightTransform] = [WeightRenaming(old, new) for old, new in _RENAMED_IN_TOWER]
    for kind in ("weight", "bias"):  # timm joins query, key and value, in this order
        parts = [f"self_attn.{name}_proj.{kind}" for name in "qkv"]
        in_tower.append(WeightConverter(f"attn.qkv.{kind}", parts, operations=[Chunk(dim=0)]))
    for transform in in_tower:
        # Only under the tower: when saving, `self_attn.q_proj` of the language model must keep its name.
        transform.scope_prefix, transform.base_model_prefix = _TOWER, ""
    return [
        *renamed,
        *in_tower,
        # (1, N, C) there, (N, C) here: a list of one tensor.
        WeightConverter(
            r"^vision\.pos_embed",
            f"^{_TOWER}.embeddings.position_embedding.weight",
            operations=[SplitModulelist(dim=0)],
        ),
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


def register_weight_names(class_name: str) -> None:
    """Tell transformers how to load and save the model class of that name. Repeating it changes nothing."""
    register_checkpoint_conversion_mapping(class_name, weight_names(), overwrite=True)
