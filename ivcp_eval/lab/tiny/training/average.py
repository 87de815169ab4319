"""The running average of a model's weights, which is what is validated and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def averaged(model: nn.Module, average: list[Tensor]) -> Iterator[None]:
    """Put ``average``, one tensor per parameter, in place of the model's weights inside the ``with`` block."""
    parameters: list[Tensor] = list(model.parameters())
    raw = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, raw)
