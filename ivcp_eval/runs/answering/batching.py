"""How many samples are answered together: what fits the device's memory, up to where more gains nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.files import DAMAGE, read_json, write_json
from ivcp_eval.interface.failures import FAILURES

if TYPE_CHECKING:
    from ivcp_eval.engine.cost.flops import DecoderShape
    from ivcp_eval.runs.answering.session import Parts, Session

#: More gains nothing: on a CPU four rows keep the cores busy, on a GPU the weights are read for all rows at once.
MOST_CPU, MOST_GPU = 4, 32
#: Part of the memory beside the weights that rows may take; the rest is for fragments and what was not foreseen.
SHARE = 0.5


@dataclass
class Fits:
    """What was too many at a time, by the size of one: of that size and any larger one, no more than this is tried.

    Sizes are powers of two, so that samples of about equal length share what was learnt.

    Attributes:
        path: a file that remembers it for whoever goes on; None forgets with the process. A damaged one costs one
            more try each.
    """

    path: Path | None = None
    worked: dict[int, int] = field(default_factory=dict)  # bits of the size -> most that did fit

    @cached_property
    def limits(self) -> dict[str, int]:
        """Bits of the size -> most at a time."""
        try:
            found = {} if self.path is None else read_json(self.path, "every batch size is tried anew")
            whole = all(size.isdecimal() and isinstance(most, int) for size, most in found.items())
        except (FileNotFoundError, *DAMAGE):
            return {}
        return dict(found) if whole else {}

    def most(self, size: int) -> int | None:
        """Most at a time of a ``size``; None where nothing was too many."""
        return min((most for bits, most in self.limits.items() if int(bits) <= size.bit_length()), default=None)

    def fitted(self, size: int, n: int) -> None:
        """So many of this size did not run out of memory."""
        self.worked[size.bit_length()] = max(n, self.worked.get(size.bit_length(), 0))

    def too_many(self, size: int, most: int) -> None:
        """More than ``most`` of this size ran out of memory; what fitted before still does."""
        most = max(most, self.worked.get(size.bit_length(), 0))
        if self.path is not None:
            vars(self).pop("limits", None)  # another process may have learnt something
        bits = f"{size.bit_length()}"
        self.limits[bits] = min(self.limits.get(bits, most), most)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.limits)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def batch_size(session: Session, longest_first: Iterable[Parts], variants: int) -> int:
    """Samples to answer together, at least 1.

    It depends on the model, the device's whole memory and the longest sample alone, not on what is free or still
    unanswered: in half precision a row is rounded as the rest of its batch has it, so who goes on after an interruption
    must come to the same number.

    Args:
        longest_first: conversations; the first that can be read stands for all.
        variants: how many answer each sample.
    """
    most = MOST_CPU if session.placement.device == "cpu" else MOST_GPU
    for parts in longest_first:
        try:
            tokens = session.prompt_tokens(parts)
        except FAILURES:  # answering it will say why
            continue
        itemsize = next(session.model.parameters()).element_size()
        row = row_bytes(session.shape, tokens, session.limits.max_new_tokens, variants, itemsize)
        return max(1, min(most, int(SHARE * _room(session.model) / row)))
    return 1


def row_bytes(shape: DecoderShape, tokens: int, new_tokens: int, variants: int, itemsize: int) -> int:
    """Estimate of what one sample takes under all variants.

    Args:
        shape: of the decoder. tokens: of the prompt. new_tokens: most that are generated.
        itemsize: bytes of a number of weights and activations.
    """
    per_token = shape.layers * shape.kv_heads * (shape.head_dim + (shape.value_dim or shape.head_dim))
    # The unpruned prefill beside the variants' own caches, at their longest.
    cache = per_token * (tokens + variants * (tokens + new_tokens))
    # In flight in one layer: residuals, queries, keys, values and the two halves of a gated MLP; as much again for a
    # vision tower, which is narrower and sees four patches a token.
    activations = 2 * tokens * (8 * shape.hidden + 3 * shape.intermediate)
    return (cache + activations) * itemsize


def _room(model: Any) -> int:
    """Bytes beside the weights, on all of the model's devices together."""
    import torch

    parameters = list(model.parameters())
    total = 0
    for device in {parameter.device for parameter in parameters}:
        if device.type == "cuda":
            total += torch.cuda.get_device_properties(device).total_memory
        else:
            import psutil

            total += psutil.virtual_memory().total
    return total - sum(parameter.nbytes for parameter in parameters)
