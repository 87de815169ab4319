"""Masks of single decode steps: which cached visual tokens a layer attends to, for methods that need "step"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivcp_eval.engine.cache import PrunedLayer, StepState
from ivcp_eval.engine.geometry import row_position_embeddings
from ivcp_eval.engine.parts import Listener
from ivcp_eval.engine.signals.capture import capture
from ivcp_eval.interface import AbstractAdapter, AbstractMethod, Signal, Step
from ivcp_eval.interface.method import check_type
from ivcp_eval.interface.ops import to_device

if TYPE_CHECKING:
    from ivcp_eval.engine.parts import Forward
    from ivcp_eval.engine.prefill import Prefill


@dataclass
class Before:
    """The layer that ran before, in one forward on a pruned cache.

    Attributes:
        make_query: (B, H, q, D) queries before RoPE. embeddings: its position embeddings.
        cached: its cache, this forward's tokens included. attention: the module.
    """

    make_query: Callable[[], Tensor]
    embeddings: Any
    cached: PrunedLayer
    attention: Any

    @property
    def scaling(self) -> float:
        """Of its logits."""
        return float(self.attention.scaling)


class StepMasks(Listener):
    """Asks the method before every layer of every forward after the prefill."""

    works_on_cache = True

    def __init__(self, adapter: AbstractAdapter, method: AbstractMethod, name: str, ratio: float) -> None:
        self.adapter, self.method, self.name, self.ratio = adapter, method, name, ratio
        self._before: Before | None = None  # of the forward that is running, if it is one on a pruned cache

    def attach(self, decoder: Any, running: Callable[[], Forward]) -> list[Any]:
        """Listen to the queries of every layer."""
        self._layers = decoder.layers
        needs: frozenset[Signal] = frozenset({"query"})
        return [handle for layer in decoder.layers for handle in capture(self.adapter, layer, needs, self._query)]

    def after(self, state: Prefill) -> None:
        """Make every layer of the cache know its slots, even where no token was removed, and what a step needs."""
        if not state.changed:
            state.finish()
        steps = StepState(state.prompt.image_mask, state.memory, state.run)
        assert state.cache is not None
        for layer in state.cache.layers:
            layer.slot_map.steps, layer.slot_map.plain = steps, False

    def attended(self, index: int, cached: PrunedLayer, new: int, embeddings: Any) -> Tensor | None:
        """What the method wants the layer to attend to."""
        steps, before = cached.slot_map.steps, self._before
        self._before = Before(_not_yet, embeddings, cached, self._layers[index].self_attn)
        return None if steps is None else self._slots(index, cached, steps, new, before)

    def forget(self) -> None:
        """Drop what is known of the layer before."""
        self._before = None

    def _query(self, _signal: str, make: Callable[[], Tensor]) -> None:
        if self._before is not None:
            self._before.make_query = make

    def _slots(
        self, index: int, layer: PrunedLayer, state: StepState, new: int, before: Before | None
    ) -> Tensor | None:
        cached = layer.keys.shape[-2]
        allowed = torch.ones(layer.keys.shape[0], cached + new, dtype=torch.bool, device=layer.keys.device)
        query = before.make_query() if before is not None else None
        masked = False
        for row in range(allowed.shape[0]):
            slots, tokens = _visual(layer, state, row)
            if not slots.numel():
                continue
            own_query = own_key = own_tokens = other_keys = None
            if before is not None and query is not None:
                embeddings = row_position_embeddings(before.embeddings, row, before.attention.config, query.device)
                own_query = self.adapter.rotate(query[row], embeddings)
                there, own_tokens = _visual(before.cached, state, row)
                own_key = before.cached.keys[row][:, to_device(there, before.cached.keys.device)]
                other_keys = partial(_other_keys, before.cached, row, there)
            step = Step(
                layer=index,
                number=cached - layer.slot_map.columns.shape[1],
                token=tokens,
                ratio=self.ratio,
                query=own_query,
                key=own_key,
                key_token=own_tokens,
                scaling=1.0 if before is None else before.scaling,
                n_layers=len(self._layers),
                memory=state.memory[row],
                other_keys=other_keys,
            )
            attended = self.method.attended(step)
            if attended is None:
                state.run.count_attended(row, index, tokens.numel())
                continue
            check_type(attended, torch.Tensor, self.name, "attended", "a bool tensor (C,), or None")
            if attended.dtype != torch.bool or attended.shape != tokens.shape:
                raise ValueError(
                    f"method {self.name!r}: `attended` returned {attended.dtype} {tuple(attended.shape)}, expected "
                    f"bool {tuple(tokens.shape)}, one for each cached visual token, or None"
                )
            allowed[row, to_device(slots, allowed.device)] = to_device(attended, allowed.device)
            masked = True
            state.run.count_attended(row, index, int(attended.sum()))
        return allowed if masked else None


def _not_yet() -> Tensor:
    raise AssertionError("the layer before has not projected its queries")


def _visual(layer: PrunedLayer, state: StepState, row: int) -> tuple[Tensor, Tensor]:
    """(C,) slots of the visual tokens in a layer's cache, and which of the prompt's visual tokens they are; on CPU."""
    known = layer.slot_map.visual
    if row not in known:
        columns = layer.slot_map.columns[row].cpu()
        visual = state.visual[row]
        slots = ((columns >= 0) & visual[columns.clamp_min(0)]).nonzero().flatten()
        known[row] = slots, torch.searchsorted(visual.nonzero().flatten(), columns[slots])
    return known[row]


def _other_keys(layer: PrunedLayer, row: int, visual: Tensor) -> Tensor:
    """(G, R, D) what a layer's cache holds of a row but the ``visual`` slots (C,) and padding."""
    other = layer.slot_map.key_columns(layer.keys.shape[-2])[row] >= 0
    other[to_device(visual, other.device)] = False
    return layer.keys[row][:, other.to(layer.keys.device)]
