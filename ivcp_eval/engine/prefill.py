"""State of one pruned prefill: which prompt columns each layer computed, and which its cache still holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.engine.cache import PrunedLayer, SlotMap, StepState, gather_slots
from ivcp_eval.engine.geometry import Rows, is_member
from ivcp_eval.engine.run import Run
from ivcp_eval.interface import Cut, ImageSpan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache


@dataclass(frozen=True)
class LayerSlots:
    """What one decoder layer's keys stand for: its alive rows, their padded matrix, and a re-numbering shift."""

    rows: Rows
    matrix: Tensor  # (B, n) prompt column of each physical slot; -1 pads. Before any cut simply 0..S-1.
    shift: Tensor | None = None


class Prefill:
    """State of one pruned prefill."""

    def __init__(self, mask: Tensor, spans: list[list[ImageSpan]], alive: Rows, n_layers: int) -> None:
        self.image_mask = mask  # (B, S) bool, CPU
        self.spans = spans
        self.now = LayerSlots(alive, torch.arange(mask.shape[1]).expand(mask.shape[0], -1))
        self.layers = [self.now] * n_layers  # what each layer's cache holds
        self.processed = [self.now] * n_layers  # what each layer computed
        self.captured: dict[str, Tensor] = {}
        self.memory: list[dict[str, Any]] = [{} for _ in spans]
        self.vision: list[dict[str, Tensor]] = [{} for _ in spans]
        self.stage = 0  # cuts and looks so far
        self.shorter = False  # whether anything was removed so far
        self.cache: Cache | None = None
        self.mask: Tensor | None = None
        self.position_embeddings: Any = None

    def visual_slots(self, layer: int) -> list[Tensor]:
        """Per row, where the visual tokens stand in the layer's cache."""
        slots = self.layers[layer]
        found = []
        for row, alive in enumerate(slots.rows.columns):
            columns = alive[self.image_mask[row, alive]]
            found.append(torch.searchsorted(slots.matrix[row].contiguous(), columns))
        return found

    def cut_caches(self, cut: Cut, device: torch.device) -> None:
        """Drop from the caches of the layers before the cut what did not survive it, as the cut's policy says."""
        if cut.cache == "from_cut":
            return
        # Layers that held the same slots go on sharing one object: slots, maps and masks are made once for all.
        moved: dict[int, tuple[LayerSlots, Tensor]] = {}
        earlier = list(self.layers)
        for layer in range(1 if cut.cache == "all_but_first" else 0, cut.layer):
            before = earlier[layer]
            if id(before) not in moved:
                now = self.now if before.shift is self.now.shift else replace(self.now, shift=before.shift)
                moved[id(before)] = now, self.now.rows.slots_in(before.matrix).to(device)
            self.layers[layer], slots = moved[id(before)]
            if self.cache is not None:
                gather_slots(self.cache.layers[layer], slots)

    def finish(self, run: Run, masks_steps: bool = False) -> None:
        """After the last layer: count into ``run``, and make the cache's layers know what they hold."""
        steps = StepState(self.image_mask, self.memory) if masks_steps else None
        counts: dict[int, list[int]] = {}
        for slots in (*self.layers, *self.processed):
            if id(slots) not in counts:
                alive_columns = enumerate(slots.rows.columns)
                counts[id(slots)] = [int(self.image_mask[i, row].sum()) for i, row in alive_columns]
        run.kept = list(self.now.rows.columns)
        run.visual_kept = counts[id(self.now)]
        run.visual_cached = [counts[id(slots)] for slots in self.layers]
        run.visual_per_layer = [counts[id(slots)] for slots in self.processed]
        if self.cache is None:
            return
        maps: dict[int, SlotMap] = {}
        for slots, (index, layer) in zip(self.layers, enumerate(self.cache.layers), strict=True):
            if id(slots) not in maps:
                maps[id(slots)] = self._slot_map(slots, layer.keys.device)
                maps[id(slots)].steps = steps
            self.cache.layers[index] = PrunedLayer(layer, maps[id(slots)])
        for slot_map in maps.values():
            slot_map.plain = len(maps) == 1 and not slot_map.padded and slot_map.shift is None and steps is None

    def _slot_map(self, slots: LayerSlots, device: torch.device) -> SlotMap:
        alive = torch.stack([is_member(*pair) for pair in zip(slots.matrix, slots.rows.columns, strict=True)])
        columns = torch.where(alive, slots.matrix, -1)
        return SlotMap(columns.to(device), self.image_mask.shape[1], not bool(alive.all()), slots.shift)
