"""How one answer may fail, what is kept of a failure, and the time limit of an answer. No torch of its own."""

from __future__ import annotations

import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ivcp_eval.files import storable

if TYPE_CHECKING:
    from torch import nn

    from ivcp_eval.interface.records import Answer

__all__ = [
    "FAILURES",
    "AnswerTimeout",
    "InputRefused",
    "StrayExit",
    "check_timeout",
    "contained",
    "deadline",
    "device_lost",
    "failure",
    "misses",
    "steps",
]

#: What one sample or variant may raise without ending the run; it is recorded, counted and retried. Everything: chat
#: templates, kernels, decoders of pictures and plug-ins have exceptions of their own.
FAILURES = (Exception,)


class AnswerTimeout(TimeoutError):
    """An answer took longer than was allowed; nothing of it is used."""


class InputRefused(ValueError):
    """The model's processor refuses a sample, such as a picture of 300 x 1 pixels. It always will: a settled miss."""


class StrayExit(RuntimeError):
    """A method, plug-in or library raised what ends programs, such as SystemExit. It failed; the program goes on."""


@contextmanager
def contained(whose: str) -> Iterator[None]:
    """Turn exceptions that are no `Exception` into `StrayExit`; also a decorator. Ctrl-C is left alone.

    Args:
        whose: code, for the message.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise StrayExit(
            f"{whose} raised {type(error).__name__}({error}), which would end the program; raise an Exception instead"
        ) from error


def check_timeout(seconds: float | None) -> None:
    """Raise ValueError unless it is a finite number above 0, or None for no limit."""
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"timeout {seconds!r} is not a number of seconds above 0; leave it out for no limit")


def failure(error: BaseException) -> dict[str, Any]:
    """What a journal keeps in place of an answer: the error in a line, and the innermost frames of its traceback.

    Addresses of objects are left out of the line, so that equal failures are equal text.
    """
    return {
        **({"settled": True} if isinstance(error, InputRefused) else {}),
        "prediction": "",
        "error": storable(re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(error).__name__}: {error}")),
        "traceback": storable("".join(traceback.format_exception(error, limit=-12))),
    }


def misses(samples: Sequence[Mapping[str, Any]], records: Mapping[str, Answer]) -> tuple[str, str]:
    """(samples that failed and may be answered another time, samples that never will be), each in words or empty.

    Args:
        samples: per-sample rows. records: of the journal, by key.
    """
    missed = [row for row in samples if row["error"]]
    closed = [row for row in missed if (record := records.get(row["prompt_sha256"])) and record.settled]
    if len(closed) == len(samples):  # then it is not the samples
        closed = []
    open_ = [row for row in missed if row not in closed]
    return (
        _counted(open_, len(samples), "samples failed"),
        _counted(closed, len(samples), "samples cannot be answered and count as wrong"),
    )


def _counted(rows: Sequence[Mapping[str, Any]], n: int, what: str) -> str:
    if not rows:
        return ""
    kinds = ", ".join(
        f"{kind} {k}" for kind, k in Counter(row["error"].partition(":")[0] for row in rows).most_common()
    )
    return f"{len(rows)} of {n} {what} ({kinds}), e.g. {rows[0]['index']}: {rows[0]['error']}"


def device_lost(model: nn.Module) -> bool:
    """Whether the process can no longer use a GPU of the model, asked after a failure.

    A device-side assert, an illegal address or a GPU that fell off the bus is reported again by every later call of the
    process, so no other answer can be made in it. Running out of memory, for one, leaves the device as it was.
    """
    import torch

    for device in {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}:
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:  # AcceleratorError
            return True
    return False


def steps(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks a model runs one after the other: the members of its outermost module lists, vision tower included."""
    from torch.nn import ModuleList

    for child in module.children():
        if isinstance(child, ModuleList):
            yield from child
        else:
            yield from steps(child)


@contextmanager
def deadline(blocks: Iterable[nn.Module], seconds: float | None) -> Iterator[Callable[[], None]]:
    """Raise `AnswerTimeout` in the block once ``seconds`` have passed; None never does.

    The clock is looked at before each of ``blocks`` runs and whenever the yielded function is called. So a prefill and
    a vision encoder are interrupted between two layers, and decoding at least once per token. What is never cut short
    is one layer, one kernel, or one image being decoded; on a GPU, which works behind, a prefill that was queued in
    time ends first. An answer that is whole when the clock is looked at for the last time counts, however late.

    Args:
        blocks: of the model (`steps`). seconds: wall time, above 0.
    """
    if seconds is None:
        yield lambda: None
        return
    start = time.monotonic()

    def check(*_: Any) -> None:
        if time.monotonic() - start > seconds:
            raise AnswerTimeout(
                f"no answer within {seconds:g} s; what was generated of it is not used. Allow more time with --timeout"
            )

    handles = [block.register_forward_pre_hook(check) for block in blocks]
    try:
        yield check
    finally:
        for handle in handles:
            handle.remove()
