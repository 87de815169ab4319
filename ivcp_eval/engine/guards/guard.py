"""Keeps a method from changing the model through what it is shown: signals are views of the model's own tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ivcp_eval.interface import Signals

FIELDS = ("visual", "text", "question", "hidden", "value", "key", "query", "raw_value")


class Untouched:
    """The signals of one row, and what changed in them since.

    Writing in place raises the version that torch counts for a tensor and all its views, so looking costs no pass over
    the data. Tensors of `torch.inference_mode` have no such count; the method then gets a copy of its own.
    """

    def __init__(self, signals: Signals) -> None:
        self.signals = _countable(signals)
        self._versions = [(name, tensor, tensor._version) for name, tensor in _tensors(self.signals)]

    def check(self, method: str) -> None:
        """Raise ValueError if the method wrote into any tensor."""
        changed = [name for name, tensor, version in self._versions if tensor._version != version]
        if changed:
            raise ValueError(
                f"method {method!r} wrote into {', '.join(f'signals.{name}' for name in changed)}, which would change "
                "the model's own states. Work on a copy (`.clone()`), and keep what is to be remembered in "
                "signals.memory. Nothing of this pass is kept."
            )


def _tensors(signals: Signals) -> Iterator[tuple[str, Tensor]]:
    for name in FIELDS:
        tensor = getattr(signals, name)
        if tensor is not None:
            yield name, tensor
    for name, tensor in signals.vision.items():
        yield f"vision[{name!r}]", tensor
    for number, image in enumerate(signals.images):
        parts = {"tokens": image.tokens, "view": image.view, "span.columns": image.span.columns}
        yield from ((f"images[{number}].{part}", tensor) for part, tensor in parts.items() if tensor is not None)


def _countable(signals: Signals) -> Signals:
    own: dict[str, Any] = {name: _own(getattr(signals, name)) for name in FIELDS if getattr(signals, name) is not None}
    images = tuple(
        replace(
            image,
            tokens=_own(image.tokens),
            view=None if image.view is None else _own(image.view),
            span=replace(image.span, columns=_own(image.span.columns)),
        )
        for image in signals.images
    )
    return replace(signals, **own, images=images, vision={name: _own(v) for name, v in signals.vision.items()})


def _own(tensor: Tensor) -> Tensor:
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
