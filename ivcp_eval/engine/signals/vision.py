"""Signals of the vision tower: what its patches attended to, per visual token of the language model."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ivcp_eval.engine.parts import Listener
from ivcp_eval.engine.signals.merging import PatchMerging
from ivcp_eval.interface import AbstractMethod, PatchStates, TowerFacts, TowerSignal, VisionTap

if TYPE_CHECKING:
    from ivcp_eval.engine.parts import Forward
    from ivcp_eval.engine.prefill import Prefill

BLOCK = {"cpu": 2**20, "gpu": 2**26}  # attention weights that exist at a time: what a cache holds; few kernels


class _Heard(threading.local):
    """What a tower said, for each thread on its own."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.patches: dict[str, Tensor] = {}
        self.images: list[dict[str, Tensor]] = []
        self.read = False  # whether a prefill used it


class VisionListener(Listener):
    """Hooks on a vision tower. What it hears is kept until other images are encoded, for each thread on its own.

    `generate` of transformers 5.20+ encodes the images once, before the first forward of the multimodal model (without
    a cache every step is a prefill on these images); older releases and bare forwards encode them inside it.
    """

    def __init__(self, tap: VisionTap | None, method: AbstractMethod, ratio: float) -> None:
        assert tap is not None  # `prune` asked the adapter before
        self.tap, self.signals = tap, method.tower_signals
        self.merging = PatchMerging(tap, method, ratio) if "group" in method.tower_signals else None
        self.numbers = sorted(set(method.tower_blocks(tap.facts).values()))
        self._heard = _Heard()

    def attach(self, decoder: Any, running: Callable[[], Forward]) -> list[Any]:
        """Listen to the tower."""
        tap = self.tap
        hear_attention, hear_block = self._after_attention, self._after_block
        handles: list[Any] = [] if self.merging is None else self.merging.attach()
        for number in self.numbers if self.signals - {"luma"} else ():
            attention, block = tap.blocks[number]
            handles.append(attention.register_forward_hook(functools.partial(hear_attention, number), with_kwargs=True))
            if self.signals & {"feature", "group"}:
                handles.append(block.register_forward_hook(functools.partial(hear_block, number)))
        encoded = functools.partial(self._after_tower, tap.tokens)
        handles.append(
            tap.tower.register_forward_hook(encoded, with_kwargs=True)
            if tap.method == "forward"
            else MethodHook(tap.tower, tap.method, encoded)
        )
        if tap.video is not None:
            method, tokens = tap.video
            handles.append(MethodHook(tap.tower, method, functools.partial(self._after_tower, tokens)))
        return handles

    def encode(self) -> None:
        """Forget every image."""
        self._heard.clear()

    def begin(self, state: Prefill) -> None:
        """Give the prefill the signals of its visual tokens."""
        videos = state.prompt.video_mask
        state.vision = self.rows(
            state.prompt.image_mask.sum(1).tolist(), None if videos is None else videos[state.prompt.image_mask]
        )

    def rows(self, sizes: list[int], in_video: Tensor | None = None) -> list[dict[str, Tensor]]:
        """Per row the signals of its visual tokens, as ``NUMBER/SIGNAL``; ``luma`` without a number; `of_method` gives
        them a method's names.

        Args:
            sizes: visual tokens of each row. Beams repeat rows, and `generate` may have encoded the images once for
                all of them.
            in_video: (sum of sizes,) bool: which of them, row after row, are a video's; None without any. All videos
                are encoded after all images.

        Raises:
            ValueError: the images that were encoded are not those of the prompt.
        """
        heard, self._heard.read = self._heard.images, True
        total = sum(next(iter(part.values())).shape[0] for part in heard)
        for repeats in (r for r in range(1, len(sizes) + 1) if len(sizes) % r == 0):
            distinct = sizes[::repeats]
            if sum(distinct) == total and [n for n in distinct for _ in range(repeats)] == sizes:
                joined = {name: torch.cat([part[name] for part in heard]) for name in heard[0]}
                if in_video is not None:
                    place = _places(torch.cat(in_video.split(sizes)[::repeats]))
                    joined = {name: signal[place.to(signal.device)] for name, signal in joined.items()}
                split = {name: signal.split(distinct) for name, signal in joined.items()}
                return [{name: parts[row // repeats] for name, parts in split.items()} for row in range(len(sizes))]
        raise ValueError(
            f"the vision tower encoded {total} visual tokens, the rows of the prompt hold {sizes}. Pass pixel_values "
            "with the prompt (not inputs_embeds or cached image features)."
        )

    def _after_attention(self, number: int, module: Any, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        self._begin()
        with torch.no_grad():
            heard = patch_signals(self.tap.states(module, args, kwargs), self.signals)
        self._heard.patches.update({f"{number}/{name}": signal for name, signal in heard.items()})

    def _after_block(self, number: int, _module: Any, _args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if "feature" in self.signals:
            self._heard.patches[f"{number}/feature"] = states.detach().flatten(0, -2)
        if self.merging is not None and number == self.tap.facts.own:
            self._heard.patches[f"{number}/group"] = torch.cat(self.merging.groups)
            self.merging.clear()

    def _after_tower(self, tokens: Any, _module: Any, args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        self._begin()
        patches, self._heard.patches = self._heard.patches, {}
        heard = tokens(patches, args, kwargs) if patches else {}
        if "luma" in self.signals and self.tap.luma is not None:
            heard["luma"] = self.tap.luma(args, kwargs)
        if heard:
            self._heard.images.append(heard)

    def _begin(self) -> None:
        """Forget what a prefill has used."""
        if self._heard.read:
            self._heard.clear()


def _places(in_video: Tensor) -> Tensor:
    """(V,) where each visual token of the prompt stands among those of all images and, behind them, of all videos."""
    place = torch.empty_like(in_video, dtype=torch.int64)
    place[torch.cat(((~in_video).nonzero().flatten(), in_video.nonzero().flatten()))] = torch.arange(place.numel())
    return place


def _by_name(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; those that the signature has no name for are left out, as it will say itself."""
    names = [p.name for p in inspect.signature(method).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


class MethodHook:
    """Hooks for a method that is no forward: until `remove`, one attribute of one object hides the method.

    The class stays as it is, and so do the results: ``before(owner, arguments by keyword)`` may raise, and
    ``after(owner, (), arguments by name, result)`` only listens. What hid the method before is called, and put back.

    Raises:
        ValueError: the object hides that method already, so that what is heard would not be the class's own.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        after: Callable[[Any, tuple[()], dict[str, Any], Any], None] | None = None,
        before: Callable[[Any, dict[str, Any]], None] | None = None,
    ) -> None:
        if after is not None and name in vars(owner):
            raise ValueError(f"{type(owner).__name__}.{name} is replaced on this object already; restore it first")
        self._hidden = {name: vars(owner)[name]} if name in vars(owner) else {}
        self.owner, self.name = owner, name
        method = getattr(owner, name)

        @functools.wraps(method)  # `generate` reads the signature
        def heard(*args: Any, **kwargs: Any) -> Any:
            named = _by_name(method, args, kwargs)
            if before is not None:
                before(owner, named)
            result = method(*args, **kwargs)
            if after is not None:
                after(owner, (), named, result)
            return result

        setattr(owner, name, heard)

    def remove(self) -> None:
        """The method is visible again."""
        vars(self.owner).pop(self.name, None)
        vars(self.owner).update(self._hidden)


def of_method(heard: Mapping[str, Tensor], method: AbstractMethod, facts: TowerFacts) -> dict[str, Tensor]:
    """What `VisionListener` heard of one row, by the names of a method; others may have listened with it."""
    blocks = {f"{name}/" if name else "": number for name, number in method.tower_blocks(facts).items()}
    found = {
        prefix + signal: heard[f"{number}/{signal}"]
        for prefix, number in blocks.items()
        for signal in sorted(method.tower_signals)
        if f"{number}/{signal}" in heard
    }
    return found | {name: heard[name] for name in method.tower_signals & {"luma"} if name in heard}


def patch_signals(states: PatchStates, names: frozenset[TowerSignal]) -> dict[str, Tensor]:
    """Those of ``names`` that queries and keys can tell, float32, of every patch: as in `Signals.vision`.

    Signals of the class token, "cls" and "joint_cls", only where there is one.
    """
    query, key = states.query.float() * states.scaling, states.key.float()
    signals: dict[str, Tensor] = {}
    if "query" in names:
        signals["query"] = (states.query.float() * states.scaling**0.5).transpose(0, 1)
    if "key" in names:
        signals["key"] = key.mean(dim=0)
    if "joint_key" in names:
        signals["joint_key"] = key.transpose(0, 1).flatten(1)
    segments = list(zip(query.split(states.segments, dim=1), key.split(states.segments, dim=1), strict=True))
    if "received" in names:
        signals["received"] = torch.cat([received(q, k) for q, k in segments])
    if states.class_token and "cls" in names:
        signals["cls"] = torch.cat([(q[:, :1] @ k.transpose(1, 2)).softmax(dim=-1).mean(dim=0)[0] for q, k in segments])
    if states.class_token and "joint_cls" in names:
        # One head as wide as all: the logits are the sum over heads, scaled by that width.
        narrower = query.shape[0] ** -0.5
        joint = [((q[:, :1] @ k.transpose(1, 2)).sum(dim=0)[0] * narrower).softmax(dim=-1) for q, k in segments]
        signals["joint_cls"] = torch.cat(joint)
    return signals


def received(query: Tensor, key: Tensor) -> Tensor:
    """(P,) attention that each key gets, mean over heads and summed over queries: (H, P, D), scaled, and (H, P, D).

    A block of queries and heads is compared with all keys at a time: no map of the whole image ever exists.
    """
    numbers = BLOCK["cpu" if key.device.type == "cpu" else "gpu"]
    n_heads, n_keys, _ = key.shape
    heads = max(1, min(n_heads, numbers // (256 * n_keys)))
    total = torch.zeros(n_keys, device=key.device)
    for q, k in zip(query.split(heads), key.split(heads), strict=True):
        for rows in q.split(max(1, numbers // (heads * n_keys)), dim=1):
            total += (rows @ k.transpose(1, 2)).softmax(dim=-1).sum(dim=(0, 1))
    return total / n_heads
