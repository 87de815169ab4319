"""Reading pictures: each once, checked, as base64 of its original bytes, on all cores, in bounded memory."""

from __future__ import annotations

import base64
import io
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ivcp_eval.benchmarks.pictures import decoded

__all__ = ["EncodedImage", "available_cores", "encode_bytes", "encode_file", "ordered_map"]

# VLMEvalKit unpacks each image as PNG; PNG holds these modes.
_PNG_MODES = frozenset({"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"})
# VLMEvalKit takes an image cell of up to 64 characters for a reference to another row.
MIN_BASE64 = 65

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class EncodedImage:
    """A picture as base64 with its size in pixels, or (``problem`` not empty) why there is none."""

    data: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


def encode_bytes(content: bytes) -> EncodedImage:
    """Check that ``content`` is a whole picture and encode the bytes as they are, without recompression.

    Only what VLMEvalKit could not unpack (CMYK and the like, or a picture of a few bytes) becomes an RGB PNG.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            (width, height), mode = picture.size, picture.mode
            # An eighth of the resolution reads every byte of a JPEG (so finds truncation) at half the cost.
            picture.draft("L", (max(1, width // 8), max(1, height // 8)))
            picture.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return EncodedImage(problem=f"the image is corrupt ({type(error).__name__}: {error})")
    if mode not in _PNG_MODES or 4 * len(content) < 3 * MIN_BASE64:
        buffer = io.BytesIO()
        try:
            decoded(io.BytesIO(content)).save(buffer, "PNG")
        except OSError as error:
            return EncodedImage(problem=str(error))
        content = buffer.getvalue()
    return EncodedImage(base64.b64encode(content).decode("ascii"), width, height)


def encode_file(path: Path) -> EncodedImage:
    """:func:`encode_bytes` of a file; a file that cannot be read is a problem, not an exception."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return EncodedImage(problem=f"the image cannot be read ({error.strerror or error})")
    return encode_bytes(content)


def available_cores() -> int:
    """Cores this process may use (a container or ``taskset`` may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[_In], _Out], items: Iterable[_In], workers: int) -> Generator[_Out, None, None]:
    """Like ``map``, over ``workers`` processes, with at most four results per worker waiting.

    ``ProcessPoolExecutor.map`` submits everything at once, and finished images pile up whenever the disk is slower
    than the decoders; here memory stays flat. With one worker no process is started.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    # "spawn": forking would copy the progress bar's thread in an undefined state.
    context = multiprocessing.get_context("spawn")
    # Ctrl-C goes to the whole process group; only this process shall report it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=ignore) as pool:
        waiting: deque[Future[_Out]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
