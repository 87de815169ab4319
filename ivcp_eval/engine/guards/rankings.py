"""Sees scores that are not finite in whatever a method ranks by, however it ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ivcp_eval.interface.ops import to_host

#: Functions that rank -> the option that says which end wins, its place among the arguments, its default.
_RANKING: Mapping[str, tuple[str, int, bool]] = {
    "topk": ("largest", 3, True),
    "sort": ("descending", 2, False),
    "argsort": ("descending", 2, False),
    "argmax": ("", 0, True),
    "argmin": ("", 0, False),
    "nan_to_num": ("", 0, True),  # how a method makes NaN the worst score, or no feature, before it ranks
}
_FUNCTIONS = frozenset(getattr(owner, name) for owner in (torch, Tensor) for name in _RANKING)


class Rankings(TorchFunctionMode):
    """While the block runs, counts NaN, and infinity on the side that wins, in what is ranked.

    Infinity on the losing side is how methods mark what is not to be chosen. Nothing waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[Tensor] = []  # () int64 for each ranking

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func not in _FUNCTIONS:  # nearly always
            return func(*args, **given)
        name = func.__name__
        scores = args[0] if args else given["input"]
        if scores.is_floating_point() and scores.ndim:
            option, place, largest = _RANKING[name]
            if option:
                largest = given.get(option, args[place] if place < len(args) else largest)
            broken = scores.isnan() | (scores == (torch.inf if largest else -torch.inf))
            # Features (V, F) are cleaned token by token; of scores (..., V) the last axis is ranked.
            if scores.ndim > 1:
                broken = broken.flatten(1).any(1) if name == "nan_to_num" else broken.flatten(0, -2).any(0)
            self.counts.append(broken.sum())
        return func(*args, **given)

    def nonfinite(self) -> int:
        """The most such places in one ranking."""
        return max(map(int, to_host(self.counts)), default=0)
