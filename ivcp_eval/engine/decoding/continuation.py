"""Forwards on a pruned cache: each layer needs a mask that fits what its own cache holds."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ivcp_eval.engine.cache import PrunedLayer, SlotMap
from ivcp_eval.engine.geometry import attention_mask
from ivcp_eval.interface.ops import to_host

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache


class Continuation:
    """State of one forward on a pruned cache."""

    def __init__(self, cache: Cache, mask: Tensor | None) -> None:
        self.cache = cache
        self.mask = mask  # the caller's (B, columns) mask, or None
        self.built: dict[tuple[int, int], Tensor | None] = {}
        self._checked = False  # whether `_check_admitted` was

    def layer_mask(
        self,
        layer: PrunedLayer,
        hidden: Tensor,
        implementation: str,
        stock: Tensor | None,
        attended: Tensor | None = None,
    ) -> Tensor | None:
        """The mask of one layer for the queries ``hidden`` (B, q, E); None where the kernel needs none.

        Layers that share a slot map share the mask, unless this one attends to some slots only (``attended`` (B, m)).

        Args:
            stock: the mask that stock code made for the layer.
        """
        layer.masked = True
        length = layer.keys.shape[-2] + hidden.shape[1]
        if attended is not None:
            columns = layer.slot_map.key_columns(length).to(hidden.device)
            if self.mask is not None:
                attended = attended & self.mask.bool().to(hidden.device).gather(1, columns.clamp_min(0))
            q, dtype = hidden.shape[1], hidden.dtype
            return attention_mask(columns, q, implementation=implementation, dtype=dtype, allowed=attended)
        key = (id(layer.slot_map), length)
        if key not in self.built:
            self.built[key] = self._build(layer.slot_map, length, hidden, implementation, stock is None)
        return self.built[key]

    def _build(
        self, slot_map: SlotMap, length: int, hidden: Tensor, implementation: str, unmasked: bool
    ) -> Tensor | None:
        q = hidden.shape[1]
        maskless = not slot_map.padded and (q == 1 or "flash" in implementation)
        if maskless and self.mask is None:
            return None
        columns = slot_map.key_columns(length).to(hidden.device)
        allowed = None
        if self.mask is not None:
            allowed = self.mask.bool().to(hidden.device).gather(1, columns.clamp_min(0))
            # As stock code does: any mask costs sdpa its flash kernel. That code has looked at all but the first
            # columns of the prompt.
            if maskless and unmasked:
                if q > 1 or not slot_map.admitted:
                    self._check_admitted(q)
                if slot_map.admitted:
                    return None
        return attention_mask(columns, q, implementation=implementation, dtype=hidden.dtype, allowed=allowed)

    def _check_admitted(self, q: int) -> None:
        """See of every slot map without padding whether the caller's mask admits all of its slots.

        The host waits once for all of them; of single steps those are not asked again that were admitted.
        """
        if self._checked:
            return
        self._checked = True
        assert self.mask is not None
        open_maps: dict[int, tuple[SlotMap, Tensor]] = {}
        for layer in self.cache.layers:
            if not isinstance(layer, PrunedLayer) or id(layer.slot_map) in open_maps:
                continue
            slot_map = layer.slot_map
            if not slot_map.padded and (q > 1 or not slot_map.admitted):
                columns = slot_map.key_columns(self.mask.shape[1] - layer.dropped)
                allowed = self.mask.bool().to(columns.device).gather(1, columns)
                open_maps[id(slot_map)] = slot_map, allowed.all()
        found = to_host([admitted for _, admitted in open_maps.values()])
        for (slot_map, _), admitted in zip(open_maps.values(), found, strict=True):
            slot_map.admitted = bool(admitted)


class Continuity:
    """Whether decoding after a pruned prompt runs on the cache that was pruned.

    Attributes:
        continued: forwards on a cache that was pruned.
    """

    def __init__(self) -> None:
        self.continued = 0
        self._lost = 0  # decoding steps after prompts of which none was on the prompt's cache
        self._strayed = 0  # those after the last prompt that were not
        self._followed = False  # whether one was
        self._pruned = False  # whether the last prompt was pruned into a cache

    def prompt_begins(self, length: int) -> None:
        """A forward on no cache, or an empty one; of a single token after a pruned prompt it is a lost cache."""
        self._pruned = self._pruned and length == 1
        if self._pruned:
            self._strayed += 1
        else:
            self._settle()

    def prompt_ended(self, pruned: bool) -> None:
        """A prompt with images is processed; whether tokens were removed and a cache holds the rest."""
        self._pruned = pruned

    def continues(self, on_pruned: bool) -> None:
        """A forward on a filled cache; whether it is one that was pruned."""
        self.continued += on_pruned
        self._followed |= on_pruned
        self._strayed += self._pruned and not on_pruned

    def _settle(self) -> None:
        """The last prompt is over."""
        self._lost += 0 if self._followed else self._strayed
        self._strayed, self._followed = 0, False

    def warn(self) -> None:
        """At the end of a block: say so if decoding after some pruned prompt was never recognised as such."""
        self._settle()
        if self._lost:
            warnings.warn(
                f"{self._lost} decoding steps followed a pruned prompt, none of them on its cache as pruning knows "
                "it. If they continued that prompt, their logits are wrong: see that the cache which the prefill "
                "returned is passed on, and that transformers is a tested release.",
                stacklevel=3,
            )
