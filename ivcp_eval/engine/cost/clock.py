"""The only clock of the project: what vision, prefill and decoding cost, by hooks around an unmodified model.

On one GPU the marks are CUDA events: nothing waits while the model runs, and a span is the time the GPU's stream
spent between two marks, host stalls included. Elsewhere (CPU, several devices) a mark synchronises and reads the
host clock. All times are milliseconds of the whole batch.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ivcp_eval.interface.names import output_cache, read

if TYPE_CHECKING:
    from torch import nn

    from ivcp_eval.interface import AbstractAdapter

__all__ = ["CallTime", "HookTime", "Phases", "call_time", "hook_time", "phases", "timed"]

T = TypeVar("T")
#: What transformers calls the module between vision encoder and decoder, where it is not part of the encoder.
PROJECTORS = ("multi_modal_projector", "connector", "aligner", "projector")
_before = functools.partial(torch.nn.Module.register_forward_pre_hook, with_kwargs=True)


# -- clocks ---------------------------------------------------------------------------------------------------------


class _Clock:
    """Marks on a host clock in seconds, each after waiting for ``devices`` (none on CPU)."""

    def __init__(self, devices: Sequence[torch.device] = (), read: Callable[[], float] = time.perf_counter) -> None:
        self.devices, self.read = tuple(devices), read

    def wait(self) -> None:
        for device in self.devices:
            torch.accelerator.synchronize(device)

    def mark(self) -> Any:
        self.wait()
        return self.read()

    def ms(self, start: Any, end: Any) -> float:
        return (end - start) * 1e3


class _EventClock(_Clock):
    """Marks on the current stream of one CUDA device; `ms` may be asked only after `wait`."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.devices[0]))
        return event

    def ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))


def _clock(module: nn.Module, cpu_time: bool = False) -> _Clock:
    devices = {parameter.device for parameter in module.parameters()} - {torch.device("cpu")}
    if cpu_time:
        if devices:
            raise ValueError(f"cpu_time measures models on the CPU only; this one is on {sorted(map(str, devices))}")
        return _Clock(read=time.process_time)
    single = len(devices) == 1 and next(iter(devices)).type == "cuda"
    return _EventClock(tuple(devices)) if single else _Clock(sorted(devices, key=str))


def timed(function: Callable[[], object], device: torch.device | str = "cpu", *, cpu_time: bool = False) -> float:
    """Milliseconds of one call, with everything it queued on ``device`` done; ``cpu_time`` as in `phases`."""
    device = torch.device(device)
    clock = _Clock(() if device.type == "cpu" else (device,), time.process_time if cpu_time else time.perf_counter)
    start = clock.mark()
    function()
    return clock.ms(start, clock.mark())


# -- phases of a model ----------------------------------------------------------------------------------------------


@dataclass
class Phases:
    """What ran inside a `phases` block; filled when the block ends without an error.

    Attributes:
        vision_ms: vision encoder and projector, all images of the block together; 0 without an image, None for a
            model without a vision encoder.
        prefill_ms: forwards of the decoder on a prompt (nothing cached), from embeddings to last hidden state, with
            everything that pruning does there.
        decode_ms: end of a forward to end of the next, over all decoding steps: with vocabulary head, sampling and
            the host's work between them. Pauses between steps of a hand-written loop count too.
        prefills, decode_steps: how many forwards those are.
        peak_bytes: most memory allocated during the block, weights included; None on CPU.
        kv_bytes: KV cache right after the last prefill.
    """

    vision_ms: float | None = None
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    prefills: int = 0
    decode_steps: int = 0
    peak_bytes: int | None = None
    kv_bytes: int = 0

    @property
    def decode_ms_per_token(self) -> float | None:
        """Time of a decoding step, all rows together; None where nothing was decoded."""
        return self.decode_ms / self.decode_steps if self.decode_steps else None

    @property
    def new_tokens(self) -> int:
        """Tokens per row: one of each prefill, one of each decoding step (speculative steps may yield more)."""
        return self.prefills + self.decode_steps


@dataclass
class _Step:
    """One forward of the decoder: where a prompt's began (None for a decoding step), and where it ended."""

    start: Any
    end: Any = None


@dataclass
class _Recorder:
    clock: _Clock
    steps: list[_Step] = field(default_factory=list)
    vision: list[tuple[Any, Any]] = field(default_factory=list)
    vision_start: Any = None
    kv_bytes: int = 0

    def before_vision(self, _module: nn.Module, _args: Any, _kwargs: Any) -> None:
        self.vision_start = self.clock.mark()

    def after_vision(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.vision.append((self.vision_start, self.clock.mark()))

    def before_text(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = read(kwargs, "cache")
        prompt = cache is None or not cache.get_seq_length()
        self.steps.append(_Step(self.clock.mark() if prompt else None))

    def after_text(self, _module: nn.Module, _args: Any, output: Any) -> None:
        # Runs after the decoder and again after the model around it, whose later mark stands: by then every other
        # hook on the decoder has run, whichever block was entered first.
        if not self.steps:
            return
        step = self.steps[-1]
        step.end = self.clock.mark()
        if step.start is not None:
            self.kv_bytes = _cache_bytes(output_cache(output))


def _cache_bytes(cache: Any) -> int:
    states = [state for layer in getattr(cache, "layers", ()) for state in (layer.keys, layer.values)]
    return sum(state.nbytes for state in states if state is not None)


@contextmanager
def phases(model: nn.Module, adapter: AbstractAdapter, *, cpu_time: bool = False) -> Iterator[Phases]:
    """Measure what ``model`` does inside the block: any number of ``generate`` calls or bare forwards.

    May be entered inside or around an `ivcp_eval.prune` block; both give the same numbers. Costs a few microseconds
    per forward. Resets CUDA's peak-memory statistics.

    Args:
        model, adapter: a model, and the adapter of its family.
        cpu_time: count the processor time of this process instead of elapsed time, on CPU only: on a machine that
            others use too, waiting for a core is not the model's doing.

    Example:
        ``with phases(model, adapter) as measured: model.generate(**inputs)`` and then ``measured.prefill_ms``.
    """
    clock = _clock(model, cpu_time)
    record, result = _Recorder(clock), Phases()
    text, around = adapter.text_model(model), adapter.multimodal_model(model)
    vision = _vision_modules(model, around)
    handles = [_before(text, record.before_text, prepend=True)]
    handles += [module.register_forward_hook(record.after_text) for module in dict.fromkeys((text, around))]
    for module in vision:
        handles += [_before(module, record.before_vision, prepend=True)]
        handles += [module.register_forward_hook(record.after_vision)]
    cuda = [device for device in clock.devices if device.type == "cuda"]
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    clock.wait()
    _fill(result, record)
    result.vision_ms = sum(clock.ms(*span) for span in record.vision) if vision else None
    result.peak_bytes = sum(torch.cuda.max_memory_allocated(device) for device in cuda) if cuda else None


def _fill(result: Phases, record: _Recorder) -> None:
    clock, last = record.clock, None
    for step in (step for step in record.steps if step.end is not None):
        if step.start is not None:
            result.prefill_ms += clock.ms(step.start, step.end)
            result.prefills += 1
        elif last is not None:  # a block entered in mid-generation has no beginning for its first step
            result.decode_ms += clock.ms(last, step.end)
            result.decode_steps += 1
        last = step.end
    result.kv_bytes = record.kv_bytes


def _vision_modules(model: Any, around: Any) -> list[nn.Module]:
    """The vision encoder, and the projector after it where that is a module of its own."""
    encoder = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else model
    if encoder in (model, around):  # transformers' answer for "there is none"
        return []
    return [encoder, *(getattr(around, name) for name in PROJECTORS if hasattr(around, name))]


# -- what hooks cost ------------------------------------------------------------------------------------------------


@dataclass
class HookTime:
    """Milliseconds spent in the other forward pre-hooks of a module, one per call; filled when the block ends."""

    ms: list[float] = field(default_factory=list)


@dataclass
class CallTime:
    """Milliseconds of every call of the functions that `around` gave out; filled when the block ends."""

    _clock: _Clock
    _spans: list[tuple[Any, Any]] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)

    def around(self, function: Callable[..., T]) -> Callable[..., T]:
        """The same function under the clock."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> T:
            start = self._clock.mark()
            result = function(*args, **kwargs)
            self._spans.append((start, self._clock.mark()))
            return result

        return timed


@contextmanager
def call_time(module: nn.Module, *, cpu_time: bool = False) -> Iterator[CallTime]:
    """Measure what functions cost that work on the device of ``module``: a method's ``select``. ``cpu_time`` as in
    `phases`.
    """
    result = CallTime(_clock(module, cpu_time))
    yield result
    result._clock.wait()
    result.ms = [result._clock.ms(start, end) for start, end in result._spans]


@contextmanager
def hook_time(module: nn.Module, *, cpu_time: bool = False) -> Iterator[HookTime]:
    """Measure what the pre-hooks that ``module`` already has cost: the decoder layer at a cut, inside a prune block.

    That is the whole cut: choosing, and gathering hidden states, position embeddings and earlier caches. ``cpu_time``
    as in `phases`.
    """
    clock, result = _clock(module, cpu_time), HookTime()
    starts: list[Any] = []
    ends: list[Any] = []
    first = _before(module, lambda *_: starts.append(clock.mark()), prepend=True)
    last = _before(module, lambda *_: ends.append(clock.mark()))
    try:
        yield result
    finally:
        first.remove()
        last.remove()
    clock.wait()
    result.ms = [clock.ms(start, end) for start, end in zip(starts, ends, strict=False)]
