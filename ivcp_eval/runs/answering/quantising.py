"""Weights stored in 8 or 4 bits, by torchao, of any loaded model: its modules stay, so every method and hook does."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

LIBRARY = "torchao"
_GROUP = 32  # weights that share a scale, at 4 bits; at 8 bits the row of an output does


def quantiser() -> str:
    """The library and its version, as results name it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return f"{LIBRARY} {version(LIBRARY)}"
    except PackageNotFoundError:
        raise ValueError(
            f"quantised weights need {LIBRARY}, which is not installed: pip install 'ivcp-eval[quantised]'"
        ) from None


def quantise(model: Any, kind: str) -> None:
    """Replace the weights of all linear layers but the output head, in place; activations keep their type.

    Layers whose inputs do not divide into groups keep 8 bits where 4 are asked for.

    Args:
        kind: of `interface.models.QUANTISED`.
    """
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
