"""A forward on a pruned cache: each layer needs a mask that fits what its own cache holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ivcp_eval.engine.cache import PrunedLayer, SlotMap
from ivcp_eval.engine.geometry import attention_mask

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache


class Continuation:
    """State of one forward on a pruned cache."""

    def __init__(self, cache: Cache, mask: Tensor | None) -> None:
        self.cache = cache
        self.mask = mask  # the caller's (B, columns) mask, or None
        self.built: dict[tuple[int, int], Tensor | None] = {}

    def layer_mask(
        self, layer: PrunedLayer, hidden: Tensor, implementation: str, attended: Tensor | None = None
    ) -> Tensor | None:
        """The mask of one layer for the queries ``hidden`` (B, q, E); None where the kernel needs none.

        Layers that share a slot map share the mask, unless this one attends to some slots only (``attended`` (B, m)).
        """
        layer.masked = True
        length = layer.keys.shape[-2] + hidden.shape[1]
        if attended is not None and not bool(attended.all()):
            columns = layer.slot_map.key_columns(length).to(hidden.device)
            if self.mask is not None:
                attended = attended & self.mask.bool().to(hidden.device).gather(1, columns.clamp_min(0))
            q, dtype = hidden.shape[1], hidden.dtype
            return attention_mask(columns, q, implementation=implementation, dtype=dtype, allowed=attended)
        key = (id(layer.slot_map), length)
        if key not in self.built:
            self.built[key] = self._build(layer.slot_map, length, hidden, implementation)
        return self.built[key]

    def _build(self, slot_map: SlotMap, length: int, hidden: Tensor, implementation: str) -> Tensor | None:
        q = hidden.shape[1]
        maskless = not slot_map.padded and (q == 1 or "flash" in implementation)
        if maskless and self.mask is None:
            return None
        columns = slot_map.key_columns(length).to(hidden.device)
        allowed = None
        if self.mask is not None:
            allowed = self.mask.bool().to(hidden.device).gather(1, columns.clamp_min(0))
            # As stock code does: any mask costs sdpa its flash kernel and a copy of the cache per query head.
            if maskless and bool(allowed.all()):
                return None
        return attention_mask(columns, q, implementation=implementation, dtype=hidden.dtype, allowed=allowed)
