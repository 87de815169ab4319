"""Edits of the cached visual keys after a prefill, for methods that compress key channels instead of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivcp_eval.engine.geometry import row_position_embeddings, take_position_embeddings, take_sequence
from ivcp_eval.engine.parts import Listener
from ivcp_eval.engine.prefill import Prefill
from ivcp_eval.interface import AbstractAdapter, AbstractMethod, CachedKeys
from ivcp_eval.interface.method import check_type, method_name
from ivcp_eval.interface.names import read

if TYPE_CHECKING:
    from torch import nn

    from ivcp_eval.engine.parts import Forward


class KeyEditor(Listener):
    """Remembers the last queries of every layer, and hands them with the cached keys to the method."""

    works_on_cache = True

    def __init__(self, adapter: AbstractAdapter, method: AbstractMethod, ratio: float) -> None:
        self.adapter, self.method, self.ratio = adapter, method, ratio
        self._queries: dict[int, list[Tensor]] = {}

    def attach(self, decoder: Any, running: Callable[[], Forward]) -> list[Any]:
        """Listen to the attention of every layer."""
        self._layers, self._running = decoder.layers, running
        listen = self._after_attention
        return [
            layer.self_attn.register_forward_hook(functools.partial(listen, index), with_kwargs=True)
            for index, layer in enumerate(decoder.layers)
        ]

    def after(self, state: Prefill) -> None:
        """Edit the keys of every layer."""
        assert state.cache is not None
        for index, layer in enumerate(state.cache.layers):
            self.edit(index, layer, state.visual_slots(index))

    def forget(self) -> None:
        """Drop every query, also of a prefill that did not end."""
        self._queries = {}

    def _after_attention(self, index: int, _module: nn.Module, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        state = self._running()
        if isinstance(state, Prefill):
            hidden = args[0] if args else read(kwargs, "hidden_states")
            slots = state.now.rows.slots_in(state.now.matrix)
            self.remember(index, self._layers[index], hidden, read(kwargs, "position_embeddings"), slots)

    def remember(self, index: int, layer: Any, hidden: Tensor, embeddings: Any, slots: Tensor) -> None:
        """Queries (H, W, D) of each row's last tokens in one layer.

        They are projected again for these few tokens, so that the whole prompt's queries of every layer need not be
        kept.

        Args:
            hidden: (B, m, E) what the attention got. embeddings: its position embeddings.
            slots: (B, n) where each row's alive tokens stand in it, -1 pads on the left.
        """
        last = slots[:, -self.method.query_window :]
        module, heads = self.adapter.projection(layer, "query")
        states = heads(module(take_sequence(hidden, last)))
        positions = take_position_embeddings(embeddings, last)
        self._queries[index] = []
        for row, counted in enumerate((last >= 0).sum(1).tolist()):
            own = row_position_embeddings(positions, row, layer.self_attn.config, states.device)
            self._queries[index].append(self.adapter.rotate(states[row], own)[:, last.shape[1] - counted :])

    def edit(self, index: int, layer: Any, visual: list[Tensor]) -> None:
        """Replace the keys of a cache layer at each row's visual slots."""
        for row, (slots, query) in enumerate(zip(visual, self._queries.pop(index), strict=True)):
            if slots.numel():
                at = slots.to(layer.keys.device)
                key = layer.keys[row][:, at]
                if not bool(key.isfinite().all()):
                    continue  # half precision overflowed: the row is lost, unpruned too, and there are no axes to find
                edited = self.method.edit_keys(CachedKeys(index, key, query.to(key.device), self.ratio))
                name = method_name(self.method)
                check_type(
                    edited, torch.Tensor, name, "edit_keys", "a torch tensor (G, V, D), as the keys it was shown"
                )
                if edited.shape != key.shape:
                    raise ValueError(
                        f"method {name!r}: `edit_keys` returned shape {tuple(edited.shape)}, expected "
                        f"{tuple(key.shape)}, that of the keys it was shown"
                    )
                layer.keys[row][:, at] = edited.to(key.dtype)
