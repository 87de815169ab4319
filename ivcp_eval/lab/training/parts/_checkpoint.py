"""What parts that make a model of its own share: the stock configuration they begin with, and the folder they leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ivcp_eval.lab.training.frozen import Frozen
from ivcp_eval.lab.training_log import write_tensors


def stock_of(name: str, frozen: Frozen) -> dict[str, Any]:
    """The configuration of the Qwen2.5-VL that a model ``name`` is made of.

    Raises:
        ValueError: a model of another family.
    """
    if frozen.model.config.model_type != "qwen2_5_vl":
        raise ValueError(
            f"{name} is made of a model of the family qwen2_5_vl (tiny2, qwen25, ...); "
            f"{frozen.weights.checkpoint.name} is of {frozen.model.config.model_type}"
        )
    stock: dict[str, Any] = frozen.model.config.to_dict()
    return stock


def write(folder: Path, state: Mapping[str, Tensor] | None, model: Any, processor: Any, config: Any = None) -> None:
    """A checkpoint as `from_pretrained` reads it; of a ``state`` of None, all but the weights."""
    config = config or model.config
    folder.mkdir(parents=True, exist_ok=True)
    if state is not None:
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        write_tensors(folder / "model.safetensors", {k: v for k, v in state.items() if k not in tied}, {"format": "pt"})
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
