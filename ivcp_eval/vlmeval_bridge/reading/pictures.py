"""Pictures: decoding them, for everyone, and unpacking them from a TSV, so that no half-written one is read.

VLMEvalKit writes each picture once and takes a file that exists for a whole one. A worker killed while it wrote would
leave a cut picture to every later run, and a second worker might read what the first is still writing. What it cannot
write (CMYK, LAB, float) or would have read as white (16-bit) is converted and written before it looks.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.files import NO_SPACE, DiskFullError, atomic_write, hold_lock
from ivcp_eval.interface.failures import InputRefused

#: Modes that VLMEvalKit writes as they are, or turns into RGB, without losing what a model sees.
_WRITTEN_RIGHT = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})

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
        hold_lock(lock, root)
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
    ending = {b"\xff\xd8": _ENDS[".jpg"], b"\x89P": _ENDS[".png"]}.get(kind)
    return len(kind) == 2 if ending is None else ending in tail


def _pictures(message: Message) -> list[Path]:
    return [Path(part["value"]) for part in message if part["type"] == "image"]


# -- decoding -------------------------------------------------------------------------------------------------------


class Unpacking:
    """Stands before a data set class of VLMEvalKit's and unpacks the pictures that the class could not."""

    img_root: str
    adds_videos = False  # whether who builds the prompts adds the video that a row names, as our runner does

    def dump_image(self, line: Any) -> Any:
        """Paths of the row's pictures, as the class gives them; none of a row that shows a video file.

        Raises:
            InputRefused: a video file, in VLMEvalKit's own loop, which would ask without it.
        """
        if "image" in line:
            for cell, name in _named(line):
                _unpack(cell, Path(self.img_root) / name)
        elif "video" in line:
            if not self.adds_videos:
                raise InputRefused("VLMEvalKit's own loop would ask about a video and not show it; use ivcp eval")
            return []
        return super().dump_image(line)  # type: ignore[misc]


def _named(line: Any) -> list[tuple[str, str]]:
    """(base64, file name) of a row's pictures, named as VLMEvalKit names them."""
    cells, index = line["image"], line["index"]
    if isinstance(cells, str):
        return [(cells, line["image_path"] if isinstance(line.get("image_path"), str) else f"{index}.png")]
    names = line["image_path"] if "image_path" in line else [f"{index}_{i}.png" for i in range(len(cells))]
    return list(zip(cells, names, strict=False)) if isinstance(names, list) else []


def _unpack(cell: str, path: Path) -> None:
    from PIL import Image

    if path.exists():
        return
    content = base64.b64decode(cell)
    with Image.open(io.BytesIO(content)) as image:  # reads the header only
        if image.mode in _WRITTEN_RIGHT:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as stream:
        decoded(io.BytesIO(content)).save(stream, "PNG")
