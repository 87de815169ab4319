"""Weights stored in 8 or 4 bits, under any method.

torchao replaces the weights of any loaded model, whose modules stay, so every method and hook does. bitsandbytes is
transformers' own way for GPUs: it replaces the linear layers while a checkpoint is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ivcp_eval.interface.models import QUANTISED

if TYPE_CHECKING:
    import torch

_GROUP = 32  # weights that share a scale, at 4 bits; at 8 bits the row of an output does


def loading(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a model's loader (`AbstractAdapter.load`) is told beside the rest: of bitsandbytes its configuration.

    4 bits are nf4, as transformers recommends; products are of ``dtype``.
    """
    if QUANTISED.get(kind) != "bitsandbytes":
        return {}
    from transformers import BitsAndBytesConfig

    if kind == "bnb8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": four}


def quantise(model: Any, kind: str) -> None:
    """Replace the weights of all linear layers but the output head by torchao's, in place; activations keep their type.

    Layers whose inputs do not divide into groups keep 8 bits where 4 are needed. What `loading` has stored stays.
    """
    if QUANTISED.get(kind) != "torchao":
        return
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    head = model.get_output_embeddings()

    def chosen(module: Any, _name: str, grouped: bool | None = None) -> bool:
        linear = isinstance(module, torch.nn.Linear) and module is not head
        return linear and grouped in (None, module.in_features % _GROUP == 0)

    if kind == "int4":
        four = IntxWeightOnlyConfig(torch.int4, PerGroup(_GROUP))  # type: ignore[attr-defined]
        quantize_(model, four, lambda module, name: chosen(module, name, True))
    quantize_(
        model, Int8WeightOnlyConfig(), lambda module, name: chosen(module, name, None if kind == "int8" else False)
    )
