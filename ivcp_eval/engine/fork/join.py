"""Rows of several prefills as one ragged batch for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ivcp_eval.engine.cache import PrunedLayer, SlotMap
from ivcp_eval.engine.fork.trunk import End
from ivcp_eval.engine.geometry import is_member
from ivcp_eval.engine.prefill import LayerSlots
from ivcp_eval.interface.ops import to_device


def join(ends: Sequence[End], prompt_length: int) -> tuple[Tensor, list[PrunedLayer]]:
    """The last hidden states (R, 1, E) and the cache layers of all rows, padded on the left.

    Row ``r`` of variant ``v`` of V becomes row ``r * V + v``. The variants' own caches are emptied layer by layer, so
    that never much more than one copy of all rows exists.
    """
    hidden = _interleaved([end.hidden for end in ends])
    maps: dict[tuple[int, ...], SlotMap] = {}
    layers = []
    for index in range(len(ends[0].cache.layers)):
        parts = [end.cache.layers[index] for end in ends]
        key = tuple(id(end.slots[index]) for end in ends)
        if key not in maps:
            maps[key] = _slot_map([end.slots[index] for end in ends], prompt_length, parts[0].keys.device)
        joined = DynamicLayer()
        joined.keys = _padded([part.keys for part in parts])
        joined.values = _padded([part.values for part in parts])
        for end in ends:
            end.cache.layers[index] = DynamicLayer()
        layers.append(PrunedLayer(joined, maps[key]))
    return hidden, layers


def claim(layers: Sequence[PrunedLayer], length: int) -> Cache:
    """A cache without contents that claims to hold ``length`` tokens, so that ``generate`` feeds what follows them."""
    cache: Any = DynamicCache()
    columns = torch.empty(layers[0].keys.shape[0], 0, dtype=torch.int64, device=layers[0].keys.device)
    nothing = SlotMap(columns, length, False, admitted=True)
    cache.layers = []
    for layer in layers:
        empty = DynamicLayer()
        empty.keys, empty.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        cache.layers.append(PrunedLayer(empty, nothing))
    return cache


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """V tensors (B, ...) -> (B * V, ...), the variants of one row next to each other."""
    return torch.stack(list(parts), dim=1).flatten(0, 1)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """V tensors (B, G, n_v, D) -> (B * V, G, max n, D), zeros on the left."""
    batch, heads, _, size = parts[0].shape
    longest = max(part.shape[2] for part in parts)
    out = parts[0].new_zeros(batch, len(parts), heads, longest, size)
    for i, part in enumerate(parts):
        out[:, i, :, longest - part.shape[2] :] = part
    return out.flatten(0, 1)


def _slot_map(slots: Sequence[LayerSlots], prompt_length: int, device: torch.device) -> SlotMap:
    longest = max(part.matrix.shape[1] for part in slots)
    columns, shifts = [], []
    for part in slots:
        alive = torch.stack([is_member(*pair) for pair in zip(part.matrix, part.rows.columns, strict=True)])
        held = torch.where(alive, part.matrix, -1)
        columns.append(torch.nn.functional.pad(held, (longest - held.shape[1], 0), value=-1))
        shifts.append(torch.zeros(len(part.rows.columns), 1, dtype=torch.int64) if part.shift is None else part.shift)
    joined = _interleaved(columns)
    shift = None
    if any(part.shift is not None for part in slots):
        shift = _interleaved([to_device(part, device) for part in shifts])
    # The mask of the decoding is the prompt's own, which admits every alive column.
    return SlotMap(to_device(joined, device), prompt_length, bool((joined < 0).any()), shift, admitted=True)
