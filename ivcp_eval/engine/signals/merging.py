"""Merging inside the vision tower: between attention and MLP of its blocks, without a change of any shape.

Every patch of a group goes on as a copy of the group's mean, so no module and no check of the model notices. Attention
over s equal keys weighs them as it would weigh one whose logit is raised by log s, which is ToMe's proportional
attention; norms and MLPs see each patch on its own. So the groups are to the last rounding what they would be if the
others had left, and of each group one visual token survives the cut behind the tower.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Patches, VisionTap


class PatchMerging(threading.local):
    """Hooks on the blocks of a tower up to its own; for each thread on its own."""

    def __init__(self, tap: VisionTap, method: AbstractMethod, ratio: float) -> None:
        self.tap, self.method, self.ratio = tap, method, ratio
        self.clear()

    def clear(self) -> None:
        """Forget every picture."""
        self.keys: list[Tensor] = []
        self.groups: list[Tensor] = []  # per picture or tile (P,): the number of each patch's group
        self.left: list[int] = []  # how many groups there are

    def attach(self) -> list[Any]:
        """Register them; returns their handles."""
        handles: list[Any] = []
        for number in range(self.tap.facts.own + 1):
            attention, _ = self.tap.blocks[number]
            after = functools.partial(self._after_attention, number)
            handles.append(attention.register_forward_hook(after, with_kwargs=True))
            between = functools.partial(self._between, number)
            handles.append(self.tap.between[number].register_forward_pre_hook(between))
        return handles

    @torch.no_grad()
    def _after_attention(self, number: int, module: Any, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        states = self.tap.states(module, args, kwargs)
        self.keys = list(states.key.float().mean(dim=0).split(states.segments))
        if number == 0:
            self.groups = [torch.arange(n, device=states.key.device) for n in states.segments]
            self.left = list(states.segments)

    @torch.no_grad()
    def _between(self, number: int, _module: Any, args: tuple[Tensor, ...]) -> None:
        # The block adds what follows to this very tensor: changed in place, no part of the block sees the old states.
        for row, (states, key) in enumerate(zip(args[0], self.keys, strict=True)):
            group, n = self.groups[row], self.left[row]
            place = torch.arange(group.numel(), device=group.device)
            one = torch.full((n,), group.numel(), device=group.device).scatter_reduce_(0, group, place, "amin")
            into = self.method.merge_patches(
                Patches(key[one], number, group.numel() - int(self.tap.facts.class_token), self.ratio, self.tap.facts)
            )
            group = into[group]
            n = int(into.max()) + 1
            total = torch.zeros(n, states.shape[1], device=states.device).index_add_(0, group, states.float())
            mean = total / torch.bincount(group, minlength=n)[:, None]
            states.copy_(mean[group])
            self.groups[row], self.left[row] = group, n
        self.keys = []
