"""Time that memory traffic alone takes: bytes of weights and KV cache, over the bandwidth of a copy on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.engine.cost.clock import timed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ivcp_eval.interface import AbstractAdapter

__all__ = ["Traffic", "copy_bandwidth", "stored_bytes"]

_COPIED = {"cpu": 2**28}  # bytes; far more than any cache holds
_COPIED_ELSEWHERE = 2**30
_COPIES = 5


@dataclass(frozen=True)
class Traffic:
    """What every forward of a dense decoder has to read, and how fast that can be.

    Both bounds leave out activations and tokens that decoding appended to the cache, so nothing is faster but what a
    cache of the processor holds.

    Attributes:
        layers, head: bytes of the decoder without its embedding table, of which few rows are read, and of the output
            head. bandwidth: bytes per second.
    """

    layers: int
    head: int
    bandwidth: float

    @classmethod
    def of(cls, model: nn.Module, adapter: AbstractAdapter, bandwidth: float) -> Traffic:
        """Of a loaded model, its weights as they are stored."""
        decoder: Any = adapter.text_model(model)
        any_model: Any = model
        embedding = stored_bytes(decoder.get_input_embeddings().parameters())
        head = stored_bytes(any_model.get_output_embeddings().parameters())
        return cls(stored_bytes(decoder.parameters()) - embedding, head, bandwidth)

    def prefill_ms(self, kv_bytes: int) -> float:
        """Embeddings to last hidden state: the layers' weights read and the cache written once, for all rows."""
        return 1e3 * (self.layers + kv_bytes) / self.bandwidth

    def decode_ms(self, kv_bytes: int) -> float:
        """One step: the weights of layers and head and the whole cache are read once, for all rows."""
        return 1e3 * (self.layers + self.head + kv_bytes) / self.bandwidth


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes in memory, of quantised weights those of their integers and scales; shared tensors count once."""
    return sum({part.data_ptr(): part.nbytes for tensor in tensors for part in _parts(tensor)}.values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of; torchao's weights have the shape and type of what they stand for."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        scales = getattr(tensor, "SCB", None) if state is None else state.absmax  # bitsandbytes' lie beside the weight
        if scales is not None:
            yield scales
        return
    for name in flatten()[0]:
        yield from _parts(getattr(tensor, name))


def copy_bandwidth(device: torch.device | str, *, cpu_time: bool = False) -> float:
    """Bytes per second that a device reads and writes while it copies one large tensor, the best of five times.

    ``cpu_time`` as in `clock.phases`: a bound must be of the same clock as the times that stand beside it.
    """
    device = torch.device(device)
    source = torch.ones(_COPIED.get(device.type, _COPIED_ELSEWHERE), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), device, cpu_time=cpu_time) for _ in range(_COPIES))
    return 2 * source.nbytes / (best / 1e3)
