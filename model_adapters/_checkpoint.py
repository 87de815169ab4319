"""Refuses checkpoints that are not whole: transformers draws what is missing at random and goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

_SAID = {
    "missing_keys": "missing (they would be random)",
    "unexpected_keys": "unknown to the model",
    "mismatched_keys": "of another shape",
    "error_msgs": "errors",
    "conversion_errors": "not converted",
}


def whole(source: str, report: Mapping[str, Any]) -> None:
    """Raise ValueError with the names of tensors that were missing, left over or of another shape.

    Args:
        report: of ``from_pretrained(output_loading_info=True)``, which leaves tied tensors out.
    """
    problems = [f"{_SAID.get(kind, kind)}: {_some(names)}" for kind, names in report.items() if names]
    if problems:
        raise ValueError(
            f"{source} does not hold the whole checkpoint of this model. Tensors {'; '.join(problems)}. Download it "
            "again, or take the checkpoint that its config.json describes."
        )


def refuse_broken(model: torch.nn.Module, source: str) -> None:
    """Raise ValueError with the names of weights that hold NaN or infinity; each is looked at once."""
    broken = [
        name
        for name, weight in model.named_parameters()
        if weight.device.type != "meta" and weight.is_floating_point() and not bool(torch.isfinite(weight).all())
    ]
    if broken:
        raise ValueError(
            f"{source} holds weights that are NaN or infinite as {next(model.parameters()).dtype}: {_some(broken)}. "
            "Download it again, or use --dtype bfloat16 or float32 if float16 is too small for it."
        )


def _some(names: Any) -> str:
    listed = sorted(map(str, names)) if isinstance(names, Iterable) and not isinstance(names, str) else [str(names)]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
