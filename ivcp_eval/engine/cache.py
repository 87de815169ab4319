"""KV cache of a pruned prompt: shorter in memory, unchanged in logical length."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ivcp_eval.engine.run import Run
from ivcp_eval.interface.ops import to_device

SUPPORTED = (
    "Only DynamicCache with plain layers can be pruned (not static, quantised, offloaded, sliding-window or "
    "encoder-decoder caches). Drop `cache_implementation=` / pass `past_key_values=DynamicCache(config=...)`."
)


@dataclass(frozen=True)
class StepState:
    """What masks of single decode steps need to know of the prompt; shared by all layers.

    Attributes:
        visual: (B, S) bool on CPU. memory: per row, what the method remembers. run: of the prefill.
    """

    visual: Tensor
    memory: list[dict[str, Any]]
    run: Run


@dataclass
class SlotMap:
    """Which prompt columns the first slots of a cache layer hold.

    Attributes:
        columns: (B, n) int64, increasing per row; -1 marks a padding slot (rows are padded on the left). Where heads
            hold different visual tokens, those of the first head: masks only ask whether a slot is past and is no
            padding, which is the same for all of them.
        prompt_length: S, the columns of the unpruned prompt.
        padded: whether any slot is padding, known on the host.
        shift: (B, 1) int64 or None: how far decode positions move down where the survivors were re-numbered.
        steps: for a method that masks single decode steps, else None.
        visual: by row, for such a method, its slots of visual tokens and which these are, on CPU, once it asked.
        admitted: whether the caller's mask was seen to admit every slot.
        plain: whether stock code alone continues rightly: one map for all layers, no padding, no shift, no masks.
    """

    columns: Tensor
    prompt_length: int
    padded: bool
    shift: Tensor | None = None
    steps: StepState | None = None
    visual: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    admitted: bool = False
    plain: bool = False

    def key_columns(self, length: int) -> Tensor:
        """(B, length) prompt column of every slot; slots after the prompt continue at ``prompt_length``."""
        batch, kept = self.columns.shape
        tail = torch.arange(length - kept, device=self.columns.device) + self.prompt_length
        return torch.cat([self.columns, tail.expand(batch, -1)], dim=1)

    def rows(self, indices: Tensor) -> SlotMap:
        """The map of the batch rows ``indices``.

        Raises:
            ValueError: rows move (beam search) under a method that remembers something of each.
        """
        if self.steps is not None and indices.tolist() != list(range(self.columns.shape[0])):
            raise ValueError("a method that masks decode steps cannot follow rows that move; use num_beams=1")
        indices = indices.to(self.columns.device)
        shift = None if self.shift is None else self.shift[indices]
        return replace(self, columns=self.columns[indices], shift=shift)


class PrunedLayer(DynamicLayer):
    """A `DynamicLayer` that lost prompt tokens. Its length is logical: positions and masks count the full prompt.

    Stock code therefore continues at the right position (second turn, manual decoding, prompt lookup).
    """

    def __init__(self, layer: DynamicLayer, slot_map: SlotMap) -> None:
        super().__init__()
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_initialized = True
        self.slot_map = slot_map
        self.masked = False  # whether a prune block made the mask of the forward that is running

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values.

        Raises:
            ValueError: outside of a prune block, where stock code would see padding, or this layer's slots as if they
                were those of the first layer.
        """
        if not (self.masked or self.slot_map.plain):
            raise ValueError(
                "this cache was pruned inside a prune block, and its rows or layers hold different numbers of tokens "
                "(or renumbered ones), which only a prune block can mask: continue inside one (any method and ratio)"
            )
        self.masked = False
        states: tuple[Tensor, Tensor] = super().update(*args, **kwargs)
        return states

    @property
    def dropped(self) -> int:
        """Prompt columns that have no slot here."""
        return self.slot_map.prompt_length - self.slot_map.columns.shape[1]

    def get_seq_length(self) -> int:
        """Logical length: prompt columns plus everything appended since."""
        return self.keys.shape[-2] + self.dropped if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical length after the query, and the offset that puts the appended tokens at their columns."""
        return self.keys.shape[-2] + query_length, self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (negative count; a positive number is older releases' absolute logical length).

        Raises:
            ValueError: if that reaches into the pruned prompt.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.get_seq_length() - tokens_to_remove)
        appended = self.keys.shape[-2] - self.slot_map.columns.shape[1]
        if count > appended:
            raise ValueError(f"cannot crop {count} tokens: only {appended} follow the pruned prompt. Prefill it again.")
        if count:
            self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]

    def reset(self) -> None:
        """Refused: a reset layer would still claim to hold the pruned prompt."""
        raise ValueError("a pruned cache cannot be reset and filled again; create a new DynamicCache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows, the slot map with them (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, the slot map with it."""
        self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, of the slot map too."""
        self.keys = self.keys.index_select(0, indices.to(self.keys.device))
        self.values = self.values.index_select(0, indices.to(self.values.device))
        self.slot_map = self.slot_map.rows(indices)


def check_cache(cache: Cache | None) -> None:
    """Raise ValueError unless every layer is a plain `DynamicLayer` (or was pruned here)."""
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        raise ValueError(f"got a {type(cache).__name__}. {SUPPORTED}")
    for layer in layers:
        if type(layer) not in (DynamicLayer, PrunedLayer):
            raise ValueError(f"got a {type(cache).__name__} with {type(layer).__name__}. {SUPPORTED}")
    replicated = getattr(cache, "layer_class_to_replicate", None)
    if replicated not in (None, DynamicLayer):
        raise ValueError(f"got a {type(cache).__name__} of {replicated.__name__}. {SUPPORTED}")


def gather_slots(layer: DynamicLayer, slots: Tensor) -> None:
    """Keep the slots (B, n') of a cache layer, or those of each head (B, G, n'), in place.

    -1 (padding) copies slot 0, which masks hide.
    """
    index = to_device(slots.clamp_min(0), layer.keys.device)[..., None]
    index = index if slots.ndim == 3 else index[:, None]
    for name in ("keys", "values"):
        states = getattr(layer, name)
        setattr(layer, name, states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3])))
