"""Masks of single decode steps: which cached visual tokens a layer attends to, for methods that need "step"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivcp_eval.engine.cache import PrunedLayer, StepState
from ivcp_eval.engine.geometry import row_position_embeddings
from ivcp_eval.interface import AbstractAdapter, AbstractMethod, Step


@dataclass
class Before:
    """The layer that ran before, in one forward on a pruned cache.

    Attributes:
        make_query: (B, H, q, D) queries before RoPE. embeddings: its position embeddings.
        cached: its cache, this forward's tokens included. config: of its attention.
    """

    make_query: Callable[[], Tensor]
    embeddings: Any
    cached: PrunedLayer
    config: Any


class StepMasks:
    """Asks the method before every layer of every forward after the prefill."""

    def __init__(self, adapter: AbstractAdapter, method: AbstractMethod, name: str, ratio: float) -> None:
        self.adapter, self.method, self.name, self.ratio = adapter, method, name, ratio

    def attended(self, index: int, layer: PrunedLayer, state: StepState, new: int, before: Before | None) -> Tensor:
        """(B, m) bool: the slots of a layer's cache that the forward may attend to, its own ``new`` tokens included.

        Args:
            index: of the decoder layer. layer: its cache before the forward. before: None for layer 0.
        """
        cached = layer.keys.shape[-2]
        allowed = torch.ones(layer.keys.shape[0], cached + new, dtype=torch.bool, device=layer.keys.device)
        query = before.make_query() if before is not None else None
        for row in range(allowed.shape[0]):
            slots, tokens = _visual(layer, state, row)
            if not slots.numel():
                continue
            own_query = own_key = own_tokens = None
            if before is not None and query is not None:
                embeddings = row_position_embeddings(before.embeddings, row, before.config)
                own_query = self.adapter.rotate(query[row], embeddings)
                there, own_tokens = _visual(before.cached, state, row)
                own_key = before.cached.keys[row][:, there.to(before.cached.keys.device)]
            number = cached - layer.slot_map.columns.shape[1]
            memory = state.memory[row]
            step = Step(index, number, tokens, self.ratio, own_query, own_key, own_tokens, memory)
            wanted = self.method.attended(step)
            if wanted is None:
                continue
            if wanted.dtype != torch.bool or wanted.shape != tokens.shape:
                raise ValueError(
                    f"method {self.name!r}: `attended` returned {wanted.dtype} {tuple(wanted.shape)}, expected bool "
                    f"{tuple(tokens.shape)}, one for each cached visual token, or None"
                )
            allowed[row, slots.to(allowed.device)] = wanted.to(allowed.device)
        return allowed


def _visual(layer: PrunedLayer, state: StepState, row: int) -> tuple[Tensor, Tensor]:
    """(C,) slots of the visual tokens in a layer's cache, and which of the prompt's visual tokens they are; on CPU."""
    columns = layer.slot_map.columns[row].cpu()
    visual = state.visual[row]
    slots = ((columns >= 0) & visual[columns.clamp_min(0)]).nonzero().flatten()
    return slots, torch.searchsorted(visual.nonzero().flatten(), columns[slots])
