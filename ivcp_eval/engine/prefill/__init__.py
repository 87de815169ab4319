"""One pruned prefill: what it keeps account of, and what happens at a cut.

`Prefill` knows which prompt columns each layer computed and which its cache still holds; `Cutter` asks the method and
gathers what it keeps.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.engine.cache import PrunedLayer, SlotMap, gather_slots
from ivcp_eval.engine.geometry import Rows, attention_mask, is_member, take_position_embeddings, take_sequence
from ivcp_eval.engine.guards.guard import Untouched
from ivcp_eval.engine.guards.rankings import Rankings
from ivcp_eval.engine.run import CutRecord, Run
from ivcp_eval.engine.signals.source import SignalSource
from ivcp_eval.engine.signals.vision import of_method
from ivcp_eval.interface import Cut, ImageSpan, Selection, Signals, check_type
from ivcp_eval.interface.names import read
from ivcp_eval.interface.ops import merge_targets, merged_states, to_device, to_host

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache

    from ivcp_eval.engine.parts import Parts
    from ivcp_eval.engine.signals.capture import Rotary


@dataclass(frozen=True)
class Prompt:
    """What the rows of a prefill hold.

    Attributes:
        image_mask: (B, S) bool on CPU, the visual tokens. alive: the columns that are not padding.
        spans: per row, its images. inputs: of the multimodal model, by name.
        video_mask: (B, S) bool on CPU, those of ``image_mask`` that were encoded as videos; None without any.
    """

    image_mask: Tensor
    alive: Rows
    spans: Sequence[list[ImageSpan]]
    inputs: Mapping[str, Any]
    video_mask: Tensor | None = None


@dataclass(frozen=True)
class LayerSlots:
    """What one decoder layer's keys stand for: its alive rows, their padded matrix, and a re-numbering shift."""

    rows: Rows
    matrix: Tensor  # (B, n) prompt column of each physical slot; -1 pads. Before any cut simply 0..S-1.
    shift: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """What a method was shown of one row and what it answered, not looked at yet: its numbers may be on a GPU.

    Attributes:
        target: (V,) `merge_targets` of the selection; None where nothing is merged.
        counts: how many scores were not finite, for each ranking, () int64.
    """

    row: int
    signals: Signals
    selection: Selection
    target: Tensor | None
    counts: tuple[Tensor, ...]

    @property
    def unread(self) -> list[Tensor]:
        """What the host must know: the indices, the images' tokens, the targets if there are any, the counts."""
        images = [image.tokens for image in self.signals.images]
        return [self.selection.keep, *images, *([] if self.target is None else [self.target]), *self.counts]


@dataclass(frozen=True)
class ChosenCut:
    """A cut at which the method has chosen; nothing was read, checked or removed yet.

    Attributes:
        hidden: (B, n, E) that would have entered the layer. places: per row, the slots of its alive tokens there.
        choices: of the rows that have visual tokens.
    """

    cut: Cut
    hidden: Tensor
    places: list[Tensor]
    choices: tuple[Choice, ...]


def read_choices(every: Sequence[Sequence[Choice]]) -> list[list[list[Tensor]]]:
    """On the host, what is `unread` of each choice of each group; the host waits once for all of them."""
    found = iter(to_host([part for choices in every for choice in choices for part in choice.unread]))
    return [[[next(found) for _ in choice.unread] for choice in choices] for choices in every]


class Prefill:
    """State of one pruned prefill."""

    def __init__(self, prompt: Prompt, n_layers: int, run: Run) -> None:
        self.prompt, self.run = prompt, run
        batch, length = prompt.image_mask.shape
        self.now = LayerSlots(prompt.alive, torch.arange(length).expand(batch, -1))
        self.layers = [self.now] * n_layers  # what each layer's cache holds
        self.processed = [self.now] * n_layers  # what each layer computed
        self.captured: dict[str, Tensor] = {}
        self.choosing = False  # whether a method is at work: what it projects then is its own
        self.memory: list[dict[str, Any]] = [{} for _ in prompt.spans]
        self.vision: list[dict[str, Tensor]] = [{} for _ in prompt.spans]
        self.stage = 0  # cuts and observations so far
        self.shorter = False  # whether anything was removed from the sequence so far
        self.evicted = False  # whether anything was removed from a single layer's cache
        self.late: list[tuple[Cut, list[Signals | None]]] = []  # evictions that wait for the last layer; per row
        self.evictions: list[tuple[Cut, list[Choice | None]]] = []  # carried out, not checked yet; per row
        self.cache: Cache | None = None
        self.mask: Tensor | None = None
        self.bias: Tensor | None = None  # (n,) of a whole sequence: added to attention's logits from now on
        self.position_embeddings: Any = None

    @property
    def changed(self) -> bool:
        """Whether the cache does not hold the prompt as stock code left it."""
        return self.shorter or self.evicted

    def visual_slots(self, layer: int) -> list[Tensor]:
        """Per row, where the visual tokens stand in the layer's cache."""
        slots = self.layers[layer]
        found = []
        for row, alive in enumerate(slots.rows.columns):
            columns = alive[self.prompt.image_mask[row, alive]]
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
                moved[id(before)] = now, to_device(self.now.rows.slots_in(before.matrix), device)
            self.layers[layer], slots = moved[id(before)]
            if self.cache is not None:
                gather_slots(self.cache.layers[layer], slots)

    def evict(self, layer: int, kept: Sequence[Tensor]) -> None:
        """Drop from the cache of one layer, which has run, all but ``kept``; what the layer then holds is told later.

        Args:
            kept: per row, increasing indices into its alive tokens, where the cache is: (G, n') of each key head, or
                (1, n') of all.
        """
        assert self.cache is not None
        device = self.cache.layers[layer].keys.device
        here = to_device(self.now.rows.slots_in(self.now.matrix), device)
        heads, longest = (max(sizes) for sizes in zip(*(indices.shape for indices in kept), strict=True))
        slots = torch.full((len(kept), heads, longest), -1, dtype=torch.int64, device=device)
        for row, (indices, alive) in enumerate(zip(kept, self.now.rows.columns, strict=True)):
            slots[row, :, longest - indices.shape[1] :] = here[row, here.shape[1] - alive.numel() :][indices]
        gather_slots(self.cache.layers[layer], slots if heads > 1 else slots[:, 0])
        self.evicted = True

    def evicted_to(self, layer: int, kept: Sequence[Tensor]) -> None:
        """Take note of what `evict` left in a layer; ``kept`` is a copy on the host."""
        pairs = zip(kept, self.now.rows.columns, strict=True)
        rows = Rows(tuple(alive[indices[0]] for indices, alive in pairs))
        self.layers[layer] = LayerSlots(rows, rows.matrix(), self.now.shift)

    def merge_cached(self, layer: int, row: int, visual: Tensor, selection: Selection) -> None:
        """Give survivors of an eviction the weighted sums of cached keys and values that the selection asks for.

        Args:
            visual: (V,) the row's visual tokens as indices into its alive ones, which the selection counts.
        """
        assert self.cache is not None
        assert selection.merge is not None
        cached, alive = self.cache.layers[layer], self.now.rows.columns[row].numel()
        at = to_device(self.now.rows.slots_in(self.now.matrix)[row, -alive:], cached.keys.device)[visual]
        per_head = selection.keep.ndim == 2
        for name in ("keys", "values"):
            states = getattr(cached, name).clone()
            for head in range(states.shape[1]):
                keep = selection.keep[head] if per_head else selection.keep
                merge = selection.merge[head] if per_head else selection.merge
                states[row, head, at[keep]] = merged_states(merge, states[row, head, at]).to(states.dtype)
            setattr(cached, name, states)

    def finish(self) -> None:
        """After the last layer: count into the run, and make the cache's layers know what they hold."""
        run = self.run
        counts: dict[int, list[int]] = {}
        for slots in (*self.layers, *self.processed):
            if id(slots) not in counts:
                alive_columns = enumerate(slots.rows.columns)
                counts[id(slots)] = [int(self.prompt.image_mask[i, row].sum()) for i, row in alive_columns]
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
            self.cache.layers[index] = PrunedLayer(layer, maps[id(slots)])
        for slot_map in maps.values():
            slot_map.plain = len(maps) == 1 and not slot_map.padded and slot_map.shift is None

    def _slot_map(self, slots: LayerSlots, device: torch.device) -> SlotMap:
        alive = torch.stack([is_member(*pair) for pair in zip(slots.matrix, slots.rows.columns, strict=True)])
        columns = torch.where(alive, slots.matrix, -1)
        return SlotMap(to_device(columns, device), self.prompt.image_mask.shape[1], not bool(alive.all()), slots.shift)


class Cutter:
    """Carries out the cuts of one engine."""

    def __init__(self, parts: Parts, decoder: Any, rotary: Rotary, run: Run) -> None:
        self.parts, self.decoder, self.rotary, self.run = parts, decoder, rotary, run
        self.adapter, self.method = parts.resolved.adapter, parts.resolved.method
        tap = self.adapter.vision_tap(parts.model) if "vision" in self.method.needs else None
        self.tower = None if tap is None else tap.facts

    def cut(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden states (B, n, E) that enter the layer of the cut; ``state`` gets the mask and embeddings to match.

        Args:
            hidden: (B, S, E) that would have entered it. kwargs: what else the layer gets.
        """
        chosen = self.choose(state, cut, hidden, kwargs)
        (found,) = read_choices([chosen.choices])
        return self.carry_out(state, chosen, found)

    def choose(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> ChosenCut:
        """The first half of `cut`: what the method chooses, for which the host does not wait."""
        if not state.shorter:
            state.position_embeddings = read(kwargs, "position_embeddings")
        hidden = self.at_layer(cut.layer, hidden)
        source = self._source(state, cut, hidden)
        here = state.now.rows.slots_in(state.now.matrix)
        places = [here[row, here.shape[1] - alive.numel() :] for row, alive in enumerate(state.now.rows.columns)]
        choices = []
        for row, (alive, slots) in enumerate(zip(state.now.rows.columns, places, strict=True)):
            signals = self._signals(state, source, row, alive, slots)
            if signals is not None:
                choice = self._choose(state, row, signals)
                choices.append(replace(choice, signals=_without_states(choice.signals)))
        state.captured = {}
        state.stage += 1
        return ChosenCut(cut, hidden, places, tuple(choices))

    def carry_out(self, state: Prefill, chosen: ChosenCut, found: Sequence[list[Tensor]]) -> Tensor:
        """The second half of `cut`.

        Args:
            found: of each choice what `read_choices` gives.
        """
        cut = chosen.cut
        columns, merged, targets = self._survivors(state, chosen, found)
        if cut.ratio == 1:  # an observation: nothing is removed
            return chosen.hidden
        after = Rows(tuple(columns))
        kept = [
            is_member(mask.nonzero().flatten(), c) for mask, c in zip(state.prompt.image_mask, columns, strict=True)
        ]
        self.run.cuts.append(CutRecord(cut.layer, tuple(kept), tuple(targets)))
        slots = after.slots_in(state.now.matrix)
        hidden = take_sequence(merged, slots)
        state.now = LayerSlots(after, after.matrix(), state.now.shift)
        state.cut_caches(cut, hidden.device)
        if cut.renumber:
            state.now = self._renumber(state, hidden)
        else:
            state.position_embeddings = take_position_embeddings(state.position_embeddings, slots)
        state.layers[cut.layer :] = [state.now] * (len(state.layers) - cut.layer)
        state.processed[cut.layer :] = state.layers[cut.layer :]
        state.mask = self._prefill_mask(state, hidden)
        state.shorter = True
        return hidden

    def shown(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> list[Signals | None]:
        """What a method is shown of each row at a cut; None of a row without visual tokens. Arguments as for `cut`."""
        if not state.shorter:
            state.position_embeddings = read(kwargs, "position_embeddings")
        source = self._source(state, cut, hidden)
        here = state.now.rows.slots_in(state.now.matrix)
        return [
            self._signals(state, source, row, alive, here[row, here.shape[1] - alive.numel() :])
            for row, alive in enumerate(state.now.rows.columns)
        ]

    def evict(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Drop tokens from the cache of the layer of an eviction, which has run.

        Args:
            hidden: (B, S, E) its output. kwargs: what it got.
        """
        rows = self.shown(state, cut, hidden, kwargs)
        state.stage += 1
        if not cut.late:
            self._evict(state, cut, rows)
            return
        for shown in rows:
            if shown is not None:
                self.watched(state, shown, self.method.observe)
        state.late.append((cut, [shown and _without_states(shown) for shown in rows]))

    def end_evictions(self, state: Prefill) -> None:
        """Once the last layer has run, carry out the evictions that waited for it, and check all of them."""
        for cut, rows in state.late:
            self._evict(state, cut, rows)
        every = [choice for _, row in state.evictions for choice in row if choice is not None]
        checked = iter(self._checked(every, *read_choices([every])))
        for cut, choices in state.evictions:
            kept = []
            for row, (choice, alive) in enumerate(zip(choices, state.now.rows.columns, strict=True)):
                is_visual = state.prompt.image_mask[row, alive]
                visual, text = is_visual.nonzero().flatten(), (~is_visual).nonzero().flatten()
                kept.append(text[None] if choice is None else _with_text(visual, text, next(checked)[0]))
            if cut.ratio < 1:
                state.evicted_to(cut.layer, kept)

    def _evict(self, state: Prefill, cut: Cut, rows: Sequence[Signals | None]) -> None:
        assert state.cache is not None
        device = state.cache.layers[cut.layer].keys.device
        choices: list[Choice | None] = []
        kept = []
        for row, (signals, alive) in enumerate(zip(rows, state.now.rows.columns, strict=True)):
            if signals is None:
                kept.append(torch.arange(alive.numel(), device=device)[None])
                choices.append(None)
                continue
            choice = self._choose(state, row, signals)
            shown, keep = choice.signals, choice.selection.keep
            if choice.selection.merge is not None:
                choice.selection.check_values(shown, self.run.method, keep.cpu())
                state.merge_cached(cut.layer, row, shown.visual, choice.selection)
            # Not checked yet, so that the host need not wait in every layer; none may lead outside of the tensor.
            kept.append(_with_text(shown.visual, shown.text, keep.clamp(0, shown.n_visual - 1)))
            choices.append(replace(choice, signals=_without_states(shown)))
        state.evictions.append((cut, choices))
        if cut.ratio < 1:
            state.evict(cut.layer, kept)

    def at_layer(self, layer: int, hidden: Tensor) -> Tensor:
        """What enters a layer, on its device: in a model spread over several, nobody else moved it yet."""
        device = next((weights.device for weights in self.decoder.layers[layer].parameters()), hidden.device)
        return hidden if device.type == "meta" else hidden.to(device)  # the weights of offloaded layers are nowhere

    def _source(self, state: Prefill, cut: Cut, hidden: Tensor) -> SignalSource:
        return SignalSource(
            adapter=self.adapter,
            family=self.parts.resolved.family,
            text_model=self.decoder,
            cut=cut,
            stage=state.stage,
            hidden=hidden,
            captured=state.captured,
            position_ids=self.rotary.ids,
            position_embeddings=state.position_embeddings,
        )

    def _survivors(
        self, state: Prefill, chosen: ChosenCut, found: Sequence[list[Tensor]]
    ) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
        """Per row the columns that survive; the hidden states, merged where asked; per row `CutRecord.merged`."""
        columns, hidden = list(state.now.rows.columns), chosen.hidden
        targets: list[Tensor | None] = [None] * len(columns)
        for choice, (keep, target) in zip(chosen.choices, self._checked(chosen.choices, found), strict=True):
            row = choice.row
            alive, image_mask = columns[row], state.prompt.image_mask[row]
            stays = ~image_mask[alive]
            visual = image_mask[alive].nonzero().flatten()
            stays[visual[keep]] = True
            columns[row] = alive[stays]
            if choice.selection.merge is None or target is None:
                continue
            at = to_device(chosen.places[row], hidden.device)[choice.signals.visual]
            merged = merged_states(choice.selection.merge, hidden[row, at])
            hidden = hidden.clone()
            hidden[row, at[choice.selection.keep]] = merged.to(hidden.dtype)
            among = torch.searchsorted(image_mask.nonzero().flatten(), alive[visual])
            targets[row] = _of_prompt(target, among, keep, int(image_mask.sum()))
        return columns, hidden, targets

    def _checked(self, choices: Sequence[Choice], found: Sequence[list[Tensor]]) -> list[tuple[Tensor, Tensor | None]]:
        """Of every choice `Selection.keep` and where merged tokens went, on the host, checked."""
        checked = []
        for choice, (keep, *more) in zip(choices, found, strict=True):
            images = [more.pop(0) for _ in choice.signals.images]
            choice.selection.check_values(choice.signals, self.run.method, keep, images)
            target = None if choice.target is None else more.pop(0)
            self.run.count_nonfinite(choice.row, max(map(int, more), default=0))
            checked.append((keep, target))
        return checked

    def _signals(self, state: Prefill, source: SignalSource, row: int, alive: Tensor, slots: Tensor) -> Signals | None:
        """What the method is shown of a row; None for a row without visual tokens."""
        image_mask = state.prompt.image_mask[row]
        is_visual = image_mask[alive]
        if not bool(is_visual.any()):
            return None
        # Vision signals cover the prompt's visual tokens; some may be gone by now.
        among = torch.searchsorted(image_mask.nonzero().flatten(), alive[is_visual])
        heard = {} if self.tower is None else of_method(state.vision[row], self.method, self.tower)
        device = source.hidden.device
        vision = {name: signal[to_device(among, signal.device)].to(device) for name, signal in heard.items()}
        seed, ids = self._row_seed(state, row, alive), self._ids(state, row, alive)
        spans, memory = state.prompt.spans[row], state.memory[row]
        return source.row(row, alive, slots, is_visual, spans, vision, memory, seed, ids)

    def _choose(self, state: Prefill, row: int, signals: Signals) -> Choice:
        """What the method was shown and what it answered; its indices are checked when they are read."""
        with Rankings() as rankings:
            shown, selection = self.watched(state, signals, self.method.select)
        check_type(selection, Selection, self.run.method, "select")
        selection.check_form(shown, self.run.method)
        evicts = shown.cut is not None and shown.cut.evicts
        target = None if selection.merge is None or evicts else merge_targets(selection.merge)
        counts = (*rankings.counts, torch.as_tensor(selection.nonfinite))
        return Choice(row, shown, selection, target, counts)

    def watched(self, state: Prefill, signals: Signals, ask: Callable[[Signals], Any]) -> tuple[Signals, Any]:
        """What the method was shown and what it answered, which must leave the model's tensors alone."""
        shown = Untouched(signals)
        state.choosing = True
        try:
            answer = ask(shown.signals)
        finally:
            state.choosing = False
        shown.check(self.run.method)
        return shown.signals, answer

    def _ids(self, state: Prefill, row: int, alive: Tensor) -> Tensor | None:
        ids = read(state.prompt.inputs, "input_ids")
        return None if ids is None else ids[row][alive]

    def _row_seed(self, state: Prefill, row: int, alive: Tensor) -> int:
        """A seed from the row's own tokens, so that a row draws the same in any batch."""
        ids = self._ids(state, row, alive)
        content = torch.tensor(alive.numel()) if ids is None else ids
        return zlib.crc32(content.long().numpy().tobytes(), zlib.crc32(str(self.parts.seed).encode()))

    def _renumber(self, state: Prefill, hidden: Tensor) -> LayerSlots:
        """Number the survivors 0..n-1; appended tokens move down by as much as the last survivor did."""
        ids = self.rotary.ids
        new = to_device(((state.now.matrix >= 0).cumsum(1) - 1).clamp_min(0), ids.device)
        last = ids[..., -1] if ids.ndim == 2 else ids[..., -1].amax(0)
        numbers = new if ids.ndim == 2 else new.expand(ids.shape[0], -1, -1)
        state.position_embeddings = self.rotary.embed(hidden, numbers)
        return replace(state.now, shift=last[:, None] - new[:, -1:])

    def _prefill_mask(self, state: Prefill, hidden: Tensor) -> Tensor | None:
        implementation = self.decoder.config._attn_implementation
        if not state.now.rows.padded and implementation != "eager":
            return None  # sdpa and flash attention are causal by themselves where the keys are the queries
        columns = to_device(state.now.matrix, hidden.device)
        return attention_mask(columns, hidden.shape[1], implementation=implementation, dtype=hidden.dtype)


def _without_states(signals: Signals) -> Signals:
    """The same row and budgets, holding nothing that is as large as the layer's states."""

    def gone(*_: Any, **__: Any) -> Any:
        raise ValueError("a late eviction is chosen after the layer is gone; keep what it needs in `observe`")

    return replace(
        signals,
        hidden=signals.hidden[:0].clone(),
        value=None,
        key=None,
        query=None,
        raw_value=None,
        rope=gone,
        attention=gone,
        rotate=gone,
        project=gone,
        normed=gone,
    )


def _with_text(visual: Tensor, text: Tensor, keep: Tensor) -> Tensor:
    """The kept and all text as increasing indices into a row's alive tokens: (1, n'), or (G, n') per key head.

    Args:
        visual, text: where they stand among the alive tokens. keep: `Selection.keep`.
    """
    kept = visual[torch.atleast_2d(keep)]
    return torch.cat((text.expand(len(kept), -1), kept), dim=1).sort(dim=1).values


def _of_prompt(target: Tensor, among: Tensor, kept: Tensor, n_prompt: int) -> Tensor:
    """`CutRecord.merged` of one row, (N,), from what was alive.

    Args:
        target: (V,) which of the K survivors each alive visual token went into, -1 for none.
        among: (V,) where the alive ones stand among the prompt's N. kept: (K,) which of them survive.
    """
    target = target.index_fill(0, kept, -1)
    went = target >= 0
    merged = torch.full((n_prompt,), -1, dtype=torch.int64)
    merged[among[went]] = among[kept[target[went]]]
    return merged
