"""Pictures that VLMEvalKit unpacks from a TSV: never read half-written ones.

VLMEvalKit writes each picture once and takes a file that exists for a whole one. A worker killed while it wrote would
leave a cut picture to every later run, and a second worker might read what the first is still writing.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivcp_eval.files import NO_SPACE, DiskFullError

Message = list[dict[str, str]]
_ENDS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND\xaeB`\x82"}


@contextmanager
def alone(dataset: Any) -> Iterator[None]:
    """Be the only process on this machine (and file system, where it locks) that unpacks pictures of a data set."""
    root = Path(getattr(dataset, "img_root", "") or ".")
    if not root.is_absolute():  # a data set without pictures of its own
        yield
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f".{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def unpacked(build: Callable[[], Message], again: bool) -> Message:
    """The message that ``build`` makes, with whole pictures.

    Args:
        again: whether a picture that is deleted is unpacked again.

    Raises:
        DiskFullError: a picture could not be written.
    """
    try:
        message = build()
        cut = [path for path in _pictures(message) if not whole(path)]
        if cut and again:
            for path in cut:
                path.unlink(missing_ok=True)
            message = build()
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DiskFullError(error.errno, f"the disk is full: a picture could not be unpacked ({error})") from error
        raise
    return message


def whole(path: Path) -> bool:
    """Whether a JPEG or PNG file has its end; other kinds count as whole."""
    end = _ENDS.get(path.suffix.lower())
    if end is None or not path.is_file():
        return True
    with path.open("rb") as stream:
        kind = stream.read(2)
        stream.seek(max(0, path.stat().st_size - 64))
        tail = stream.read()
    # Names lie: what matters is what the file begins with.
    wanted = {b"\xff\xd8": _ENDS[".jpg"], b"\x89P": _ENDS[".png"]}.get(kind)
    return len(kind) == 2 if wanted is None else wanted in tail


def _pictures(message: Message) -> list[Path]:
    return [Path(part["value"]) for part in message if part["type"] == "image"]
