"""The engine: hooks on an unmodified transformers model that cut the sequence where a method says.

One forward is either a prefill (nothing cached, images present) or a continuation. In a prefill the layers run
untouched up to a cut; there the method chooses, hidden states, position embeddings and the caches of earlier layers
are gathered once, and every later layer gets the shorter mask and embeddings in place of the ones the model loop
keeps passing. In a continuation on a pruned cache every layer gets a mask that fits its own cache. Why each step is
needed: docs/design/engine.md.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.engine.cache import PrunedLayer, check_cache
from ivcp_eval.engine.decoding.continuation import Continuation
from ivcp_eval.engine.decoding.drafts import Drafts
from ivcp_eval.engine.decoding.steps import Before, StepMasks
from ivcp_eval.engine.geometry import Rows, attention_mask, take_position_embeddings, take_sequence
from ivcp_eval.engine.guards.guard import Untouched
from ivcp_eval.engine.guards.refusals import (
    refuse_chunks,
    refuse_compiled,
    refuse_labels,
    refuse_unsupported,
    refuse_videos,
)
from ivcp_eval.engine.guards.turns import Turns
from ivcp_eval.engine.prefill import LayerSlots, Prefill
from ivcp_eval.engine.run import Run
from ivcp_eval.engine.signals.capture import capture
from ivcp_eval.engine.signals.keys import KeyEditor
from ivcp_eval.engine.signals.source import SignalSource
from ivcp_eval.engine.signals.vision import MethodHook, VisionListener
from ivcp_eval.interface import AbstractAdapter, AbstractMethod, Cut, Selection, check_type
from ivcp_eval.interface.names import check_names, output_cache, read, write
from ivcp_eval.interface.ops import merged_states

if TYPE_CHECKING:
    from torch import Tensor, nn


class Engine:
    """Hooks for one model, method and ratio. `attach` and `detach`; `ivcp_eval.prune` does both."""

    def __init__(
        self,
        model: nn.Module,
        adapter: AbstractAdapter,
        family: str,
        method: AbstractMethod,
        cuts: tuple[Cut, ...],
        run: Run,
        image_mask: Tensor | None = None,
        span_options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.adapter, self.family, self.method, self.run = model, adapter, family, method, run
        self.cuts = {cut.layer: cut for cut in cuts}
        self.text_model: Any = adapter.text_model(model)
        self.given_mask, self.span_options, self.seed = image_mask, dict(span_options or {}), seed
        self.vision = VisionListener(adapter.vision_tap(model)) if "vision" in method.needs and cuts else None
        edits = "cached_key" in method.needs and run.ratio < 1
        self.keys = KeyEditor(adapter, method, run.ratio) if edits else None
        masks = "step" in method.needs and run.ratio < 1
        self.steps = StepMasks(adapter, method, run.method, run.ratio) if masks else None
        self._turns = Turns([model, adapter.multimodal_model(model), self.text_model])
        self._handles: list[Any] = []
        self._image_mask: Tensor | None = None
        self._inputs: dict[str, Any] = {}
        self._pass: Prefill | Continuation | None = None
        self._position_ids: Tensor | None = None
        self._rotating = False
        self._pruned_last = False  # whether the last prompt was pruned into a cache
        self.continued = self._stray = 0  # forwards of one token after such a prompt, on its cache or not

    # -- life cycle ---------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Register every hook.

        Raises:
            ValueError: the model is inside another prune block, compiled (compiled code ignores later hooks), or of a
                transformers release whose forwards do not take what the hooks read.
        """
        # The hooks themselves are the only mark, so that none can be left behind.
        hooks = self.text_model._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Engine) for hook in hooks):
            raise ValueError("the model is already inside a prune block; leave that block before entering another")
        refuse_compiled(self.model)
        check_names(self.model, self.text_model)
        before = functools.partial(torch.nn.Module.register_forward_pre_hook, with_kwargs=True)
        keep = self._handles.append
        self._handles += self._turns.open()
        keep(before(self.model, refuse_labels))
        if self.cuts or self.keys is not None or self.steps is not None:
            self._handles += Drafts(self.model, self._has_images).attach()
            if hasattr(self.model, "generate"):
                keep(MethodHook(self.model, "generate", before=refuse_chunks))
        keep(before(self.adapter.multimodal_model(self.model), self._before_model))
        keep(before(self.text_model, self._before_text_model))
        keep(before(self.text_model.rotary_emb, self._before_rotary))
        for cut in self.cuts.values():
            if cut.layer > 0:
                layer, needs = self.text_model.layers[cut.layer - 1], self.method.needs | cut.needs
                self._handles += capture(self.adapter, layer, needs, self._store)
        if self.vision is not None:
            self._handles += self.vision.attach()
        for index, layer in enumerate(self.text_model.layers):
            keep(before(layer, functools.partial(self._before_layer, index)))
            if self.steps is not None:
                self._handles += capture(self.adapter, layer, frozenset({"query"}), self._query)
            if self.keys is not None:
                after = functools.partial(self._after_attention, index)
                keep(layer.self_attn.register_forward_hook(after, with_kwargs=True))
        keep(self.text_model.register_forward_hook(self._after_text_model, with_kwargs=True, always_call=True))
        self._handles += self._turns.close()

    def detach(self) -> None:
        """Remove every hook and forget every tensor."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()
        self._turns.end()

    def warn_if_unhooked(self) -> None:
        """At the end of a block: say so if decoding after a pruned prompt was never recognised as such."""
        if self._stray and not self.continued:
            warnings.warn(
                f"{self._stray} decoding steps followed a pruned prompt, none of them on its cache as pruning knows "
                "it. If they continued that prompt, their logits are wrong: see that the cache which the prefill "
                "returned is passed on, and that transformers is a tested release.",
                stacklevel=3,
            )

    def _forget(self) -> None:
        self._pass, self._image_mask, self._position_ids, self._inputs = None, None, None, {}
        if self.keys is not None:
            self.keys.forget()

    def _store(self, signal: str, make: Callable[[], Tensor]) -> None:
        if isinstance(self._pass, Prefill):
            self._pass.captured[signal] = make()

    def _query(self, _signal: str, make: Callable[[], Tensor]) -> None:
        if isinstance(self._pass, Continuation) and self._pass.before is not None:
            self._pass.before.make_query = make

    # -- before the text model ----------------------------------------------------------------------------------

    def _has_images(self, inputs: Mapping[str, Any]) -> bool:
        mask = self.given_mask if self.given_mask is not None else self.adapter.image_mask(self.model, inputs)
        return mask is not None and bool(mask.any())

    def _before_model(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._inputs = dict(kwargs)
        if args:
            self._inputs.setdefault("input_ids", args[0])
        refuse_videos(self._inputs)
        self._image_mask = self.adapter.image_mask(self.model, self._inputs)
        pixels = read(self._inputs, "pixel_values") is not None
        if self.cuts and pixels and self.given_mask is None and read(self._inputs, "input_ids") is None:
            raise ValueError("got pixel_values with inputs_embeds: pass input_ids, or prune(..., image_mask=...)")
        encoded = read(self._inputs, "mm_encoder_outputs") is not None
        if self.vision is not None and pixels and not encoded:
            self.vision.clear()  # the tower runs inside this forward

    def _before_text_model(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._pass = None
        embeds, ids = read(kwargs, "inputs_embeds"), read(kwargs, "input_ids")
        ids = args[0] if ids is None and args else ids
        states = embeds if embeds is not None else ids
        if states is None:
            raise ValueError("pass input_ids or inputs_embeds")
        refuse_unsupported(self.text_model, kwargs)
        batch, length = states.shape[:2]
        cache, mask = read(kwargs, "cache"), read(kwargs, "attention_mask")
        if cache is not None and cache.get_seq_length() > 0:
            if self._image_mask is not None and bool(self._image_mask.any()):
                raise ValueError(
                    "got an image on a cache that already holds a prompt (a second turn with a new image, or chunked "
                    "prefill). Prefill the whole conversation on a new cache instead."
                )
            if any(isinstance(layer, PrunedLayer) for layer in cache.layers):
                self._pass = Continuation(cache, mask)
                self.continued += 1
            else:
                self._stray += self._pruned_last
            return
        valid = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool().cpu()
        if valid.shape != (batch, length):
            raise ValueError(f"got an attention_mask of shape {tuple(valid.shape)}, expected {(batch, length)}")
        alive = Rows(tuple(row.nonzero().flatten() for row in valid))
        visual = self._visual_mask(batch, length).cpu() & valid
        spans = self.adapter.image_spans(self.model, visual, self._inputs) if bool(visual.any()) else []
        self._stray += self._pruned_last and length == 1
        self._pruned_last = self._pruned_last and length == 1
        self._start_record(visual, alive)
        if self.cuts and bool(visual[:, -1].any()):
            raise ValueError(
                "a prompt ends with a visual token, whose logits a cut may drop. Put text after the last image."
            )
        if (self.cuts or self.keys or self.steps) and spans:
            spans = [[replace(span, **self.span_options) for span in row] for row in spans]
            self._pass = Prefill(visual, spans, alive, len(self.text_model.layers))
            if self.vision is not None:
                self._pass.vision = self.vision.rows(visual.sum(1).tolist())

    def _visual_mask(self, batch: int, length: int) -> Tensor:
        """(B, S) bool: the mask given to `prune`, else the adapter's; all False where no image is passed."""
        mask = self._image_mask if self.given_mask is None else self.given_mask.bool()
        if mask is None:
            return torch.zeros(batch, length, dtype=torch.bool)
        if batch % mask.shape[0] or mask.shape[1] > length:
            raise ValueError(f"image_mask has shape {tuple(mask.shape)}, the prompt is {(batch, length)}")
        # Beams repeat every row; without a cache the prompt grows by the generated tokens.
        mask = mask.repeat_interleave(batch // mask.shape[0], dim=0)
        return torch.nn.functional.pad(mask, (0, length - mask.shape[1]))

    def _start_record(self, visual: Tensor, alive: Rows) -> None:
        run, n_layers = self.run, len(self.text_model.layers)
        run.kept = list(alive.columns)
        run.visual_prompt = run.visual_kept = visual.sum(1).tolist()
        run.visual_per_layer = [run.visual_prompt] * n_layers
        run.visual_cached = [run.visual_prompt] * n_layers
        run.prefills += 1
        run.nonfinite_scores = [0] * visual.shape[0]

    # -- layers -------------------------------------------------------------------------------------------------

    def _before_rotary(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._rotating:
            given = read(kwargs, "position_ids")
            self._position_ids = args[1] if given is None else given

    def _before_layer(self, index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        state = self._pass
        if state is None:
            return None
        if isinstance(state, Continuation):
            return args, self._continue_layer(state, index, args[0], kwargs)
        if state.cache is None:
            state.cache = read(kwargs, "cache")
            check_cache(state.cache)
            if state.cache is None and (self.keys is not None or self.steps is not None):
                raise ValueError(
                    f"method {self.run.method!r} works on the cache of the prompt; it cannot run with use_cache=False"
                )
        if index in self.cuts:
            args = (self._cut(state, self.cuts[index], args[0], kwargs), *args[1:])
        if not state.shorter:
            return None
        embeddings = state.position_embeddings
        return args, write(kwargs, attention_mask=state.mask, position_embeddings=embeddings, position_ids=None)

    def _cut(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if not state.shorter:
            state.position_embeddings = read(kwargs, "position_embeddings")
        assert self._position_ids is not None
        source = SignalSource(
            self.adapter,
            self.family,
            self.text_model,
            cut,
            state.stage,
            hidden,
            state.captured,
            self._position_ids,
            state.position_embeddings,
        )
        here = state.now.rows.slots_in(state.now.matrix)
        columns: list[Tensor] = []
        entering = hidden
        for row, alive in enumerate(state.now.rows.columns):
            slots = here[row, here.shape[1] - alive.numel() :]
            keep, hidden = self._select_row(state, source, row, alive, slots, hidden)
            columns.append(alive[keep])
        state.captured = {}
        state.stage += 1
        if cut.ratio == 1:
            return entering
        after = Rows(tuple(columns))
        slots = after.slots_in(state.now.matrix)
        hidden = take_sequence(hidden, slots)
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

    def _select_row(
        self, state: Prefill, source: SignalSource, row: int, alive: Tensor, slots: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which of the row's alive tokens survive, (n,) bool on CPU; and the hidden states, merged where asked."""
        is_visual = state.image_mask[row, alive]
        if not bool(is_visual.any()):
            return torch.ones(alive.numel(), dtype=torch.bool), hidden
        # Vision signals cover the prompt's visual tokens; some may be gone by now.
        prompt_visual = state.image_mask[row].nonzero().flatten()
        among = torch.searchsorted(prompt_visual, alive[is_visual])
        vision = {name: signal[among.to(signal.device)].to(hidden.device) for name, signal in state.vision[row].items()}
        shown = Untouched(
            source.row(
                row, alive, slots, is_visual, state.spans[row], vision, state.memory[row], self._row_seed(row, alive)
            )
        )
        signals = shown.signals
        selection: Selection = self.method.select(signals)
        shown.check(self.run.method)
        check_type(selection, Selection, self.run.method, "select")
        selection.check(signals, self.run.method)
        self.run.count_nonfinite(row, selection.nonfinite)
        keep = ~is_visual
        keep[signals.visual.cpu()[selection.keep.cpu()]] = True
        if selection.merge is not None:
            at = slots.to(hidden.device)[signals.visual]
            merged = merged_states(selection.merge, hidden[row, at])
            hidden = hidden.clone()
            hidden[row, at[selection.keep]] = merged.to(hidden.dtype)
        return keep, hidden

    def _row_seed(self, row: int, alive: Tensor) -> int:
        """A seed from the row's own tokens, so that a row draws the same in any batch."""
        ids = read(self._inputs, "input_ids")
        content = torch.tensor(alive.numel()) if ids is None else ids[row].cpu()[alive]
        return zlib.crc32(content.long().numpy().tobytes(), zlib.crc32(str(self.seed).encode()))

    def _after_attention(self, index: int, _module: nn.Module, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        state = self._pass
        if isinstance(state, Prefill) and self.keys is not None:
            hidden = args[0] if args else read(kwargs, "hidden_states")
            slots = state.now.rows.slots_in(state.now.matrix)
            layer = self.text_model.layers[index]
            self.keys.remember(index, layer, hidden, read(kwargs, "position_embeddings"), slots)

    def _renumber(self, state: Prefill, hidden: Tensor) -> LayerSlots:
        """Number the survivors 0..n-1; appended tokens move down by as much as the last survivor did."""
        ids = self._position_ids
        assert ids is not None
        new = ((state.now.matrix >= 0).cumsum(1) - 1).clamp_min(0).to(ids.device)
        last = ids[..., -1] if ids.ndim == 2 else ids[..., -1].amax(0)
        state.position_embeddings = self._embed(hidden, new if ids.ndim == 2 else new.expand(ids.shape[0], -1, -1))
        return replace(state.now, shift=last[:, None] - new[:, -1:])

    def _embed(self, hidden: Tensor, position_ids: Tensor) -> Any:
        self._rotating = True
        try:
            return self.text_model.rotary_emb(hidden, position_ids)
        finally:
            self._rotating = False

    def _prefill_mask(self, state: Prefill, hidden: Tensor) -> Tensor | None:
        if not state.now.rows.padded and self.text_model.config._attn_implementation != "eager":
            return None  # sdpa and flash attention are causal by themselves where the keys are the queries
        implementation = self.text_model.config._attn_implementation
        columns = state.now.matrix.to(hidden.device)
        return attention_mask(columns, hidden.shape[1], implementation=implementation, dtype=hidden.dtype)

    def _continue_layer(
        self, state: Continuation, index: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        layer = state.cache.layers[index]
        if not isinstance(layer, PrunedLayer):
            return kwargs
        steps = layer.slot_map.steps
        attended = None
        if self.steps is not None and steps is not None:
            attended = self.steps.attended(index, layer, steps, hidden.shape[1], state.before)
        mask = state.layer_mask(layer, hidden, self.text_model.config._attn_implementation, attended)
        kwargs = write(kwargs, attention_mask=mask)
        if layer.slot_map.shift is not None:
            assert self._position_ids is not None
            kwargs = write(kwargs, position_embeddings=self._embed(hidden, self._position_ids - layer.slot_map.shift))
        if self.steps is not None:
            config = self.text_model.layers[index].self_attn.config
            state.before = Before(_not_yet, read(kwargs, "position_embeddings"), layer, config)
        return kwargs

    # -- after the text model -----------------------------------------------------------------------------------

    def _after_text_model(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        state = self._pass
        try:
            if output is None:  # the forward raised
                return
            cache = output_cache(output) or read(kwargs, "cache")
            if isinstance(state, Prefill):
                if cache is not None and state.cache is not cache:
                    raise ValueError(
                        "the cache of this forward did not reach the decoder layers by a name that pruning knows, so "
                        "it could not be pruned and decoding would be wrong; install a tested release of transformers"
                    )
                self._pruned_last = cache is not None and state.shorter
                if self.keys is not None:
                    assert state.cache is not None
                    for index, layer in enumerate(state.cache.layers):
                        self.keys.edit(index, layer, state.visual_slots(index))
                if state.shorter or self.steps is not None:
                    self._finish_prefill(state)
            layers = [] if cache is None else cache.layers
            self.run.kv_lengths = [0 if la.keys is None else la.keys.shape[-2] for la in layers]
        finally:
            self._forget()

    def _finish_prefill(self, state: Prefill) -> None:
        state.finish(self.run, self.steps is not None)


def _not_yet() -> Tensor:
    raise AssertionError("the layer before has not projected its queries")
