"""Engines of a one-pass fork: the shared unpruned prefill, one variant's own layers, and the common decoding.

All three are engines like that of `ivcp_eval.prune`, so a variant in a fork goes through the same code.
See docs/design/fork.md.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
from transformers.cache_utils import Cache, DynamicCache

from ivcp_eval.engine.cache import PrunedLayer
from ivcp_eval.engine.geometry import Rows
from ivcp_eval.engine.hooks import Engine, listeners_for
from ivcp_eval.engine.parts import Parts, Resolved
from ivcp_eval.engine.prefill import ChosenCut, LayerSlots, Prefill, Prompt
from ivcp_eval.engine.run import Run
from ivcp_eval.interface import (
    AbstractAdapter,
    AbstractMethod,
    Cut,
    ModelFacts,
    Selection,
    Signal,
    Signals,
    TowerFacts,
    TowerSignal,
)
from ivcp_eval.interface.names import output_cache, read, write

if TYPE_CHECKING:
    from torch import Tensor


class TrunkDone(Exception):
    """Ends a prefill whose upper layers no variant needs."""


@dataclass(frozen=True)
class _Unpruned(AbstractMethod):
    """Chooses nothing; it only has needs, those of all variants.

    Attributes:
        blocks: of the vision tower, 0-based.
    """

    needs: frozenset[Signal] = frozenset()  # type: ignore[misc] # class variables of the base
    tower_signals: frozenset[TowerSignal] = frozenset()  # type: ignore[misc]
    blocks: frozenset[int] = frozenset()

    @classmethod
    def of(cls, methods: Sequence[AbstractMethod], model: Any, adapter: AbstractAdapter) -> _Unpruned:
        """What is heard in the vision tower for all ``methods``."""
        listening = [method for method in methods if "vision" in method.needs]
        tap = adapter.vision_tap(model) if listening else None
        if tap is None:
            return cls()
        blocks = frozenset(n for method in listening for n in method.tower_blocks(tap.facts).values())
        return cls(frozenset({"vision"}), frozenset().union(*(m.tower_signals for m in listening)), blocks)

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return ()

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        return {str(number): number for number in self.blocks}

    def select(self, signals: Signals) -> Selection:
        raise AssertionError("a trunk never selects")


@dataclass(frozen=True)
class Snapshot:
    """What enters one decoder layer of the trunk; tensors are references."""

    hidden: Tensor  # (B, S, E)
    kwargs: Mapping[str, Any]
    captured: Mapping[str, Tensor]  # projections of the layer before
    position_ids: Tensor


@dataclass
class End:
    """One variant after its prefill.

    Attributes:
        run: what was measured. hidden: (B, 1, E) normed states of the last tokens.
        cache: its keys and values. slots: per layer what they stand for.
    """

    run: Run
    hidden: Tensor
    cache: Cache
    slots: list[LayerSlots]


@final
class Trunk(Engine):
    """The unpruned prefill of B rows, which keeps references at the layers where variants observe or cut.

    Attributes:
        snapshots: by layer. cache: the prompt's keys and values, never written by anyone. hidden: (B, 1, E), None if
            the prefill ended early. position_ids: what the rotary embedding got.
        prompt: the rows' images; None without any. vision: per row, signals of its visual tokens, of every block that
            a variant listens to.
    """

    def __init__(
        self,
        model: Any,
        adapter: AbstractAdapter,
        family: str,
        layers: Mapping[int, frozenset[Signal]],
        whole: bool,
        layout: Mapping[str, Any],
        methods: Sequence[AbstractMethod],
    ) -> None:
        options = {key: value for key, value in layout.items() if value is not None}
        cuts = tuple(Cut(layer, 1.0, needs=signals) for layer, signals in layers.items())
        resolved = Resolved(adapter, family, _Unpruned.of(methods, model, adapter), "none", 1.0, cuts)
        known = {name: options.pop(name, None) for name in ("image_mask", "frames")}
        parts = Parts(model, resolved, **known, span_options=options)
        super().__init__(parts, listeners_for(model, resolved))
        self.last = None if whole else max(layers)
        self.snapshots: dict[int, Snapshot] = {}
        self.prompt: Prompt | None = None
        self.vision: list[dict[str, Tensor]] = []
        self.position_ids: Tensor | None = None
        self.cache: Cache | None = None
        self.hidden: Tensor | None = None

    def prefill(self, inputs: Mapping[str, Any]) -> None:
        """Run it through ``generate``, so that the model prepares everything as it does for a variant alone."""
        try:
            self.attach()
            self.model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        except TrunkDone:
            pass
        finally:
            self.detach()

    def end(self) -> End:
        """The unpruned row, which every variant that cuts nothing shares."""
        assert self.cache is not None
        assert self.hidden is not None
        run = replace(self.run)
        length = self.cache.layers[0].keys.shape[-2]
        slots = LayerSlots(Rows(tuple(run.kept)), torch.arange(length).expand(len(run.kept), -1))
        return End(run, self.hidden, _shared(self.cache, len(self.cache.layers)), [slots] * len(self.cache.layers))

    def at_cut(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Keep what variants need here, and end the prefill where none needs more."""
        self.prompt, self.vision = state.prompt, state.vision
        self.snapshots[cut.layer] = Snapshot(hidden, dict(kwargs), state.captured, self.rotary.ids)
        state.captured = {}
        if cut.layer == self.last:
            self._keep(read(kwargs, "cache"))
            raise TrunkDone
        return hidden

    def after_forward(self, output: Any) -> None:
        """Keep the whole cache and the last hidden states of the prefill."""
        if self.cache is None:
            self._keep(output_cache(output))
            self.hidden = output.last_hidden_state[:, -1:]

    def _keep(self, cache: Cache) -> None:
        self.position_ids = self.rotary.ids
        self.cache = _shared(cache, len(cache.layers))


@final
class Branch(Engine):
    """One variant: layers k..L-1 alone on its own, unpadded sequence, k being its first cut.

    Attributes:
        chosen: by layer, its observations and its first cut in the trunk, at which the method has chosen.
    """

    def __init__(self, parts: Parts, trunk: Trunk, first: int) -> None:
        """Ask the method.

        Args:
            trunk: after its prefill. first: k.
        """
        super().__init__(parts)
        assert trunk.prompt is not None
        assert trunk.cache is not None
        prompt, n_layers = trunk.prompt, len(self.decoder.layers)
        self._trunk, self._first = trunk, first
        self._read: dict[int, list[list[Tensor]]] = {}
        self.run.start(prompt.image_mask, prompt.alive.columns, prompt.spans, n_layers)
        self._state = state = Prefill(prompt, n_layers, self.run)
        state.vision, state.cache = trunk.vision, _shared(trunk.cache, first)
        self.chosen: dict[int, ChosenCut] = {}
        for index in (layer for layer in self.cuts if layer <= first):
            snapshot = trunk.snapshots[index]
            state.captured = dict(snapshot.captured)
            self.resume(state, snapshot.position_ids)
            self.chosen[index] = self.cutter.choose(state, self.cuts[index], snapshot.hidden, snapshot.kwargs)

    def prefill(self, read: Mapping[int, list[list[Tensor]]]) -> End:
        """Run it; the trunk's tensors stay as they are.

        Args:
            read: by layer what was `chosen`, as `read_choices` gives it.
        """
        first, state = self._first, self._state
        snapshot, layers = self._trunk.snapshots[first], self.decoder.layers
        for index in (layer for layer in self.chosen if layer < first):
            self.cutter.carry_out(state, self.chosen[index], read[index])
        self._read = {first: read[first]}
        self.attach()
        try:
            self.resume(state, snapshot.position_ids)
            hidden, kwargs = snapshot.hidden, write(snapshot.kwargs, cache=state.cache)
            for layer in layers[first:]:
                hidden = layer(hidden, **kwargs)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            state.finish()
            assert state.cache is not None
            self.run.kv_lengths = [layer.keys.shape[-2] for layer in state.cache.layers]
            return End(self.run, self.decoder.norm(hidden[:, -1:]), state.cache, state.layers)
        finally:
            self.detach()

    def at_cut(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What the method keeps; at the first cut, what it has chosen already."""
        if cut.layer in self._read:
            return self.cutter.carry_out(state, self.chosen[cut.layer], self._read.pop(cut.layer))
        return self.cutter.cut(state, cut, hidden, kwargs)

    def after_forward(self, output: Any) -> None:
        """The text model itself never runs here."""


@final
class Joined(Engine):
    """Decoding of all rows: the first step of ``generate`` is answered from the prefills, the others are computed."""

    def __init__(self, trunk: Trunk, hidden: Tensor, layers: Sequence[PrunedLayer]) -> None:
        of = trunk.parts.resolved
        resolved = Resolved(of.adapter, of.family, _Unpruned(), "none", 1.0, ())
        super().__init__(Parts(trunk.model, resolved))
        self._hidden: Tensor | None = hidden
        self._layers = list(layers)

    def at_cut(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Decoding has no cut."""
        raise AssertionError("the rows of a fork are decoded without a cut")

    def after_forward(self, output: Any) -> None:
        """Put the prefills' last hidden states and their caches in place of what the first step gave."""
        if self._hidden is not None:
            output.last_hidden_state = self._hidden
            output_cache(output).layers[:] = self._layers
            self._hidden, self._layers = None, []


def _shared(cache: Cache, first: int) -> Cache:
    """A cache whose layers below ``first`` refer to the same tensors, and whose other layers are empty."""
    shared = DynamicCache()
    # Growing and gathering a `DynamicLayer` replaces its tensors, so a shallow copy is enough.
    shared.layers = [copy.copy(layer) if i < first else type(layer)() for i, layer in enumerate(cache.layers)]
    return shared
