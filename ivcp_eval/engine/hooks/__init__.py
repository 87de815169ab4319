"""The engine: hooks on an unmodified transformers model that cut the sequence where a method says.

One forward is either a prefill (nothing cached, images present) or a continuation. In a prefill the layers run
untouched up to a cut; there the method chooses, hidden states, position embeddings and the caches of earlier layers
are gathered once, and every later layer gets the shorter mask and embeddings in place of the ones the model loop
keeps passing. In a continuation on a pruned cache every layer gets a mask that fits its own cache. Why each step is
needed: docs/design/engine.md.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch

from ivcp_eval.engine.cache import PrunedLayer, check_cache
from ivcp_eval.engine.decoding.continuation import Continuation, Continuity
from ivcp_eval.engine.decoding.drafts import Drafts
from ivcp_eval.engine.decoding.steps import StepMasks
from ivcp_eval.engine.geometry import Rows, biased, restricted
from ivcp_eval.engine.guards.refusals import (
    refuse_chunks,
    refuse_compiled,
    refuse_labels,
    refuse_unsupported,
    refuse_videos,
)
from ivcp_eval.engine.guards.turns import Turns
from ivcp_eval.engine.parts import Listener, Parts, Resolved
from ivcp_eval.engine.prefill import Cutter, Prefill, Prompt
from ivcp_eval.engine.prefill.keys import KeyEditor
from ivcp_eval.engine.prefill.sparse import SparseLayers
from ivcp_eval.engine.run import Run
from ivcp_eval.engine.signals.capture import Rotary, capture
from ivcp_eval.engine.signals.vision import MethodHook, VisionListener
from ivcp_eval.interface import Cut
from ivcp_eval.interface.names import check_names, output_cache, read, write
from ivcp_eval.interface.ops import to_host

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ivcp_eval.engine.parts import Forward


#: Floating inputs of more numbers are pixels or states, which the host need not know.
LARGEST_READ = 4096


def listeners_for(model: Any, resolved: Resolved) -> list[Listener]:
    """The optional parts that a method's needs ask for."""
    adapter, method, ratio = resolved.adapter, resolved.method, resolved.ratio
    listeners: list[Listener] = []
    if "vision" in method.needs and resolved.cuts:
        listeners.append(VisionListener(adapter.vision_tap(model), method, ratio))
    if "cached_key" in method.needs and ratio < 1:
        listeners.append(KeyEditor(adapter, method, ratio))
    if "step" in method.needs and ratio < 1:
        listeners.append(StepMasks(adapter, method, resolved.name, ratio))
    if resolved.is_sparse:
        listeners.append(SparseLayers(method, resolved.name, ratio))
    return listeners


class Engine(ABC):
    """Hooks for one model, method and ratio. `attach` and `detach`; `ivcp_eval.prune` does both.

    What happens at a cut, and what with a finished forward, is up to the subclass, which is final.

    Attributes:
        run: what was measured. continuity: whether decoding found the cache that was pruned.
    """

    def __init__(self, parts: Parts, listeners: Sequence[Listener] = ()) -> None:
        self.parts, self.listeners = parts, tuple(listeners)
        self.model, self.adapter, self.decoder = parts.model, parts.resolved.adapter, parts.decoder
        ratio = parts.resolved.ratio
        share = parts.resolved.method.key_share(ratio) if ratio < 1 else 1.0
        self.run = Run(method=parts.resolved.name, ratio=ratio, key_share=share)
        self.cuts = {cut.layer: cut for cut in parts.resolved.cuts if not cut.evicts}
        self.evictions = {cut.layer: cut for cut in parts.resolved.cuts if cut.evicts}
        self.rotary = Rotary(self.decoder.rotary_emb)
        self.cutter = Cutter(parts, self.decoder, self.rotary, self.run)
        self.continuity = Continuity()
        self._needs_cache = bool(self.evictions) or any(listener.works_on_cache for listener in self.listeners)
        self._works = bool(self.cuts) or self._needs_cache or any(one.works_on_prefill for one in self.listeners)
        self._turns = Turns([self.model, self.adapter.multimodal_model(self.model), self.decoder])
        self._handles: list[Any] = []
        self._image_mask: Tensor | None = None
        self._inputs: dict[str, Any] = {}
        self._running: Forward = None

    @abstractmethod
    def at_cut(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What enters the layer of a cut in place of ``hidden`` (B, n, E); ``kwargs`` are the layer's arguments."""

    @abstractmethod
    def after_forward(self, output: Any) -> None:
        """A forward of the text model ended without an exception. May change its ``output``."""

    # -- life cycle ---------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Register every hook.

        Raises:
            ValueError: the model is inside another prune block, compiled (compiled code ignores later hooks), or of a
                transformers release whose forwards do not take what the hooks read.
        """
        # The hooks themselves are the only mark, so that none can be left behind.
        hooks = self.decoder._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Engine) for hook in hooks):
            raise ValueError("the model is already inside a prune block; leave that block before entering another")
        refuse_compiled(self.model)
        check_names(self.model, self.decoder)
        before = functools.partial(torch.nn.Module.register_forward_pre_hook, with_kwargs=True)
        keep = self._handles.append
        self._handles += self._turns.open()
        keep(before(self.model, refuse_labels))
        if self._works:
            steps = self.run.ratio < 1 and "step" in self.parts.resolved.method.needs
            self._handles += Drafts(self.model, self._has_images, refused=steps).attach()
            if hasattr(self.model, "generate"):
                keep(MethodHook(self.model, "generate", before=refuse_chunks))
        keep(before(self.adapter.multimodal_model(self.model), self._before_model))
        keep(before(self.decoder, self._before_text_model))
        self._handles += self.rotary.attach()
        for cut in self.parts.resolved.cuts:
            source = cut.layer if cut.evicts else cut.layer - 1
            if source >= 0:
                layer, needs = self.decoder.layers[source], self.parts.resolved.method.needs | cut.needs
                self._handles += capture(self.adapter, layer, needs, self._store)
        for index, layer in enumerate(self.decoder.layers):
            keep(before(layer, functools.partial(self._before_layer, index)))
            if index in self.evictions:
                evict = functools.partial(self._evict, self.evictions[index])
                keep(layer.register_forward_hook(evict, with_kwargs=True))
        for listener in self.listeners:
            self._handles += listener.attach(self.decoder, lambda: self._running)
        keep(self.decoder.register_forward_hook(self._after_text_model, with_kwargs=True, always_call=True))
        self._handles += self._turns.close()

    def detach(self) -> None:
        """Remove every hook and forget every tensor."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()
        self._turns.end()

    def resume(self, state: Prefill, position_ids: Tensor) -> None:
        """Go on with a prefill whose earlier layers another engine ran; its layers are then called one by one."""
        self._running = state
        self.rotary.use(position_ids)

    def _forget(self) -> None:
        self._running, self._image_mask, self._inputs = None, None, {}
        self.rotary.forget()
        for listener in self.listeners:
            listener.forget()

    def _store(self, signal: str, make: Callable[[], Tensor]) -> None:
        if isinstance(self._running, Prefill) and not self._running.choosing:
            self._running.captured[signal] = make()

    # -- before the text model ----------------------------------------------------------------------------------

    def _has_images(self, inputs: Mapping[str, Any]) -> bool:
        given = self.parts.image_mask
        mask = given if given is not None else self.adapter.image_mask(self.model, inputs)
        return mask is not None and bool(mask.any())

    def _before_model(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._inputs = dict(kwargs)
        if args:
            self._inputs.setdefault("input_ids", args[0])
        refuse_videos(self._inputs, self.adapter.no_videos)
        self._image_mask = self.adapter.image_mask(self.model, self._inputs)
        pixels = any(read(self._inputs, name) is not None for name in ("pixel_values", "pixel_values_videos"))
        if self.cuts and pixels and self.parts.image_mask is None and read(self._inputs, "input_ids") is None:
            raise ValueError("got pixel_values with inputs_embeds: pass input_ids, or prune(..., image_mask=...)")
        if pixels and read(self._inputs, "mm_encoder_outputs") is None:
            for listener in self.listeners:
                listener.encode()

    def _before_text_model(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._running = None
        embeds, ids = read(kwargs, "inputs_embeds"), read(kwargs, "input_ids")
        ids = args[0] if ids is None and args else ids
        states = embeds if embeds is not None else ids
        if states is None:
            raise ValueError("pass input_ids or inputs_embeds")
        refuse_unsupported(self.decoder, kwargs)
        cache, mask = read(kwargs, "cache"), read(kwargs, "attention_mask")
        if cache is not None and cache.get_seq_length() > 0:
            self._begin_continuation(cache, mask)
        else:
            self._begin_prefill(states.shape[0], states.shape[1], mask)

    def _begin_continuation(self, cache: Any, mask: Tensor | None) -> None:
        if self._image_mask is not None and bool(self._image_mask.any()):
            raise ValueError(
                "got an image on a cache that already holds a prompt (a second turn with a new image, or chunked "
                "prefill). Prefill the whole conversation on a new cache instead."
            )
        pruned = any(isinstance(layer, PrunedLayer) for layer in cache.layers)
        self.continuity.continues(pruned)
        if pruned:
            self._running = Continuation(cache, mask)

    def _begin_prefill(self, batch: int, length: int, mask: Tensor | None) -> None:
        given = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
        if given.shape != (batch, length):
            raise ValueError(f"got an attention_mask of shape {tuple(given.shape)}, expected {(batch, length)}")
        (valid, visual), self._inputs = _on_host([given, self._visual_mask(batch, length)], self._inputs)
        alive = Rows(tuple(row.nonzero().flatten() for row in valid))
        visual = visual & valid
        spans = self.adapter.image_spans(self.model, visual, self._inputs) if bool(visual.any()) else []
        spans = self.parts.completed(spans)
        self.continuity.prompt_begins(length)
        self.run.start(visual, alive.columns, spans, len(self.decoder.layers))
        if self.cuts and bool(visual[:, -1].any()):
            raise ValueError(
                "a prompt ends with a visual token, whose logits a cut may drop. Put text after the last image."
            )
        if self._works and spans:
            videos = self.adapter.video_mask(self.model, self._inputs)
            prompt = Prompt(visual, alive, spans, self._inputs, None if videos is None else videos & visual)
            state = Prefill(prompt, len(self.decoder.layers), self.run)
            self._running = state
            for listener in self.listeners:
                listener.begin(state)

    def _visual_mask(self, batch: int, length: int) -> Tensor:
        """(B, S) bool: the mask given to `prune`, else the adapter's; all False where no image is passed."""
        mask = self._image_mask if self.parts.image_mask is None else self.parts.image_mask.bool()
        if mask is None:
            return torch.zeros(batch, length, dtype=torch.bool)
        if batch % mask.shape[0] or mask.shape[1] > length:
            raise ValueError(f"image_mask has shape {tuple(mask.shape)}, the prompt is {(batch, length)}")
        # Beams repeat every row; without a cache the prompt grows by the generated tokens.
        mask = mask.repeat_interleave(batch // mask.shape[0], dim=0)
        return torch.nn.functional.pad(mask, (0, length - mask.shape[1]))

    # -- layers -------------------------------------------------------------------------------------------------

    def _before_layer(self, index: int, _layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        state = self._running
        if state is None:
            return None
        if isinstance(state, Continuation):
            return args, self._continue_layer(state, index, args[0], kwargs)
        if state.cache is None:
            state.cache = read(kwargs, "cache")
            check_cache(state.cache)
            if state.cache is None and self._needs_cache:
                raise ValueError(
                    f"method {self.run.method!r} works on the cache of the prompt; it cannot run with use_cache=False"
                )
        if index in self.cuts:
            args = (self.at_cut(state, self.cuts[index], args[0], kwargs), *args[1:])
        if state.shorter:
            embeddings = state.position_embeddings
            kwargs = write(kwargs, attention_mask=state.mask, position_embeddings=embeddings, position_ids=None)
        if state.bias is not None:
            kwargs = write(kwargs, attention_mask=biased(read(kwargs, "attention_mask"), state.bias, args[0].dtype))
        for listener in self.listeners:
            seen = listener.entered(state, self.cutter, index, args[0], kwargs)
            if seen is not None:
                kwargs = write(kwargs, attention_mask=restricted(read(kwargs, "attention_mask"), seen))
        return args, kwargs

    def _continue_layer(
        self, state: Continuation, index: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        layer = state.cache.layers[index]
        if not isinstance(layer, PrunedLayer):
            return kwargs
        if layer.slot_map.shift is not None:
            embeddings = self.rotary.embed(hidden, self.rotary.ids - layer.slot_map.shift.to(self.rotary.ids.device))
            kwargs = write(kwargs, position_embeddings=embeddings)
        embeddings = read(kwargs, "position_embeddings")
        given = [listener.attended(index, layer, hidden.shape[1], embeddings) for listener in self.listeners]
        masks = [mask for mask in given if mask is not None]
        attended = functools.reduce(torch.logical_and, masks) if masks else None
        stock, implementation = read(kwargs, "attention_mask"), self.decoder.config._attn_implementation
        mask = state.layer_mask(layer, hidden, implementation, stock, attended)
        return write(kwargs, attention_mask=mask)

    def _evict(self, cut: Cut, _layer: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(self._running, Prefill):
            hidden = output[0] if isinstance(output, tuple) else output
            self.cutter.evict(self._running, cut, hidden, kwargs)

    # -- after the text model -----------------------------------------------------------------------------------

    def _after_text_model(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        try:
            if output is None:  # the forward raised
                return
            cache = output_cache(output) or read(kwargs, "cache")
            if isinstance(self._running, Prefill):
                self._end_prefill(self._running, cache)
            layers = [] if cache is None else cache.layers
            self.run.kv_lengths = [0 if la.keys is None else la.keys.shape[-2] for la in layers]
            self.after_forward(output)
        finally:
            self._forget()

    def _end_prefill(self, state: Prefill, cache: Any) -> None:
        if cache is not None and state.cache is not cache:
            raise ValueError(
                "the cache of this forward did not reach the decoder layers by a name that pruning knows, so "
                "it could not be pruned and decoding would be wrong; install a tested release of transformers"
            )
        self.cutter.end_evictions(state)
        self.continuity.prompt_ended(pruned=cache is not None and state.changed)
        if state.changed:
            state.finish()
        for listener in self.listeners:
            listener.after(state)


def _on_host(tensors: list[Tensor], inputs: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Copies on the host of ``tensors`` and of those inputs that describe the prompt; pixels and states stay."""
    small = [
        name
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and not (value.is_floating_point() and value.numel() > LARGEST_READ)
    ]
    copied = to_host([*tensors, *(inputs[name] for name in small)])
    n = len(tensors)
    return copied[:n], {**inputs, **dict(zip(small, copied[n:], strict=True))}


@final
class Pruner(Engine):
    """The engine of `ivcp_eval.prune`: cuts the sequence in every prefill."""

    def at_cut(self, state: Prefill, cut: Cut, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What the method keeps."""
        return self.cutter.cut(state, cut, hidden, kwargs)

    def after_forward(self, output: Any) -> None:
        """The output of a forward is the model's own."""
