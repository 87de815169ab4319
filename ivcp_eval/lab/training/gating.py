"""Gates on the visual tokens of a frozen model, through which a loss reaches what chose them.

Pruning has no gradient: a token is there or not. In training every token stays, with a gate g in 0..1: from the cut on
its weight in every attention is multiplied by g before the weights are made to add up to 1. At 1 and 0 that is what
pruning computes, and a token that is shut out still says whether the loss would fall or rise if it came back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from ivcp_eval.engine import resolve
from ivcp_eval.engine.guards.refusals import refuse_other_kernels
from ivcp_eval.engine.hooks import Engine, listeners_for
from ivcp_eval.engine.parts import Parts
from ivcp_eval.engine.prefill import Prefill
from ivcp_eval.interface import AbstractMethod, Cut, Signals

SHUT = 1e-6  # weight of a token whose gate is 0: next to nothing, but with a gradient
Gate = Callable[[Signals], Tensor]
Where = Literal["attention", "states"]


def straight_through(chosen: Tensor, soft: Tensor) -> Tensor:
    """(V,) gates that are 1 at the indices ``chosen`` and 0 elsewhere, with the gradient of ``soft`` (V,)."""
    return with_gradient_of(soft, torch.zeros_like(soft).index_fill(0, chosen, 1.0))


def with_gradient_of(soft: Tensor, hard: Tensor) -> Tensor:
    """Exactly the values of ``hard``, with the gradient of ``soft``."""
    return hard + (soft - soft.detach())


def bounded(gates: Tensor) -> Tensor:
    """``gates`` (V,) of which those that are shut get no larger gradient than the largest of those that are open.

    Where a token's weight would be far above all others' (a sink), its gradient at 0 is up to 1 / `SHUT`: that of a
    weight which stops growing at once, and no measure of what opening the gate would change. Its sign is kept.
    """
    opened = gates.detach() > SHUT

    def limit(gradient: Tensor) -> Tensor:
        largest = gradient[opened].abs().max()
        return torch.where(opened, gradient, gradient.clamp(-largest, largest))

    if gates.requires_grad:
        gates.register_hook(limit)
    return gates


def log_gate(gate: Tensor) -> Tensor:
    """What is added to the logits of an attention for weights times ``gate``; its gradient is that of the product.

    d log g = dg / g, so a gate of 0 has to stand for `SHUT` in both.
    """
    open_by = gate.detach().clamp_min(SHUT)
    return open_by.log() + (gate - gate.detach()) / open_by


@final
class Gating(Engine):
    """Hooks that leave the sequence whole and weigh its visual tokens by what ``gate`` says at every cut.

    Of several cuts the gates are multiplied. ``where`` a gate applies: to the weights of "attention", or to the
    "states" that enter the layer of the cut, as VisionSelector is trained. One row a forward, without a cache.

    Args:
        visible: how many columns of the row are the prompt. The method is not shown the answer behind it.
    """

    def __init__(self, parts: Parts, gate: Gate, where: Where, visible: int) -> None:
        super().__init__(parts, listeners_for(parts.model, parts.resolved))
        self.gate, self.where, self.visible = gate, where, visible

    def at_cut(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The states of every token, gated where that is how."""
        (signals,) = self.cutter.shown(state, cut, hidden, kwargs)
        state.captured = {}
        state.stage += 1
        if signals is None:
            return hidden
        text, question = (tokens[tokens < self.visible] for tokens in (signals.text, signals.question))
        gate = self.gate(replace(signals, text=text, question=question)).float()
        if self.where == "states":
            factor = torch.ones(hidden.shape[1], device=hidden.device).index_copy(0, signals.visual, gate)
            return hidden * factor[:, None].to(hidden.dtype)
        added = torch.zeros(hidden.shape[1], device=hidden.device).index_copy(0, signals.visual, log_gate(gate))
        state.bias = added if state.bias is None else state.bias + added
        return hidden

    def after_forward(self, output: Any) -> None:
        """The output is the model's own."""


@contextmanager
def gated(
    model: Any,
    method: AbstractMethod,
    ratio: float,
    gate: Gate,
    *,
    visible: int,
    where: Where = "attention",
    layout: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """Gate the visual tokens of every forward inside the block, at the cuts of ``method`` and by its signals.

    Args:
        gate: gives (V,) gates of the signals of a cut. layout: options of `ivcp_eval.prune` for the prompt.
        visible: as of `Gating`.

    Raises:
        Unsupported: the model gives not what the method reads, or its attention takes no weights. ValueError: as
            `ivcp_eval.prune`.
    """
    resolved = resolve(model, method, ratio, None, {})
    if where == "attention":
        refuse_other_kernels(resolved.adapter.text_model(model), "gates weigh tokens")
    options = {key: value for key, value in (layout or {}).items() if value is not None}
    frames = options.pop("frames", None)
    parts = Parts(model=model, resolved=resolved, span_options=options, frames=frames, seed=seed)
    engine = Gating(parts, gate, where, visible)
    try:
        engine.attach()
        yield
    finally:
        engine.detach()
