"""The questions and pictures of chosen samples, from the benchmark's own TSV where that is on this machine."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import json
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import clips
from ivcp_eval.benchmarks.grounding import ground_truth
from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.files import data_root, long_cells
from ivcp_eval.interface.method import Rectangle
from ivcp_eval.interface.records.sheets import sheet_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MOST_JPEG", "Question", "Questions", "jpeg"]

MOST_JPEG = 30_000  # bytes
_SIDE = 480  # pixels of the longer side of a picture
#: An image cell of up to this many characters is the index of the row that has the picture (VLMEvalKit's format).
_REFERENCE = 64


@dataclass(frozen=True)
class Question:
    """One row of a benchmark.

    Attributes:
        text: question, options below it. box: true box of a grounding question. picture: base64; the first of several.
        video: what was shown of a video, as `clips.opened` takes it, or its frames as ``pictures`` in base64.
    """

    text: str
    box: Rectangle | None
    picture: str
    video: Mapping[str, Any] | None = None

    def sheet(self, steps: int) -> Image:
        """The video's steps as one picture. Raises OSError or ValueError if it cannot be decoded."""
        from PIL import Image

        assert self.video is not None
        if "pictures" in self.video:
            frames = [_decoded(picture) for picture in self.video["pictures"]]
            return sheet_of(frames, self.video["seconds"], steps)
        clip = clips.opened(self.video)
        return sheet_of([Image.fromarray(frame) for frame in clip["video"]], clip["seconds"], steps)


@dataclass(frozen=True)
class Questions:
    """Of one benchmark, by index; ``missing`` says why there are none."""

    by_index: Mapping[str, Question]
    missing: str = ""

    @classmethod
    def read(cls, benchmark: str, sha256: str, indices: Collection[str], video: str = "") -> Questions:
        """The rows with these indices, of the very file that was asked; pictures of other rows are never held.

        Args:
            benchmark: its name. sha256: of its file, and video: how videos became frames, as the results state it.
        """
        known = benchmarks.load(benchmark) if benchmarks.data_file(benchmark).is_file() else None
        sampling = None
        if known and "=" in video:  # "nframe=8, PyAV ..."
            known = replace(known, sampling=video.partition(",")[0])
            sampling = known.frames
        path = (known and known.path) or data_root() / f"{known.vlmeval if known else benchmark}.tsv"
        if not path.is_file():
            return cls({}, f"{path.name} is not on this machine")
        here = benchmarks.content_digest(known or benchmarks.undeclared(benchmark), path)
        if not sha256 or here != sha256:
            return cls({}, f"{path.name} on this machine is not the file that was asked")
        try:
            rows = {row["index"]: row for row in _rows(path, lambda row: row.get("index") in indices)}
            referenced = {cell for row in rows.values() if 0 < len(cell := row.get("image") or "") <= _REFERENCE}
            pictures = {}
            if referenced:
                for row in _rows(path, lambda row: row.get("index") in referenced):
                    pictures[row["index"]] = row.get("image") or ""
        except (csv.Error, UnicodeDecodeError) as error:
            return cls({}, f"{path.name} cannot be read: {error}")
        boxes = known is not None and known.kind == "grounding" and known.reference == "answers"
        by_index = {}
        for index, row in rows.items():
            cell = row.get("image") or ""
            box, picture = _box(row) if boxes else None, pictures.get(cell, cell)
            shown = _video(row, picture, sampling, known is not None and known.path is not None)
            by_index[index] = Question(_text(row), box, _first(picture), shown)
        return cls(by_index)


def _rows(path: Path, fits: Callable[[Mapping[str, str]], bool]) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream, long_cells():
        yield from (row for row in csv.DictReader(stream, delimiter="\t") if fits(row))


def _text(row: Mapping[str, str]) -> str:
    lines = [row.get("hint") or "", row.get("question") or ""]
    lines += [f"{letter}. {row[letter]}" for letter in string.ascii_uppercase if row.get(letter)]
    return "\n".join(line for line in lines if line)


def _box(row: Mapping[str, str]) -> Rectangle | None:
    frame = {"answer_width": row.get("width"), "answer_height": row.get("height")}
    try:
        x0, y0, x1, y1 = ground_truth({**frame, **row}).box
    except ValueError:  # which its evaluation counted as a miss, or refused
        return None
    return x0, y0, x1, y1


def _video(
    row: Mapping[str, str], cell: str, sampling: clips.Sampling | None, with_paths: bool
) -> Mapping[str, Any] | None:
    """What a row shows of a video; None of a picture, and of files whose place VLMEvalKit's classes know alone."""
    if row.get("seconds"):
        try:
            seconds = [float(at) for at in json.loads(row["seconds"])]
        except (ValueError, TypeError):
            return None
        pictures = _listed(cell)
        if len(pictures) != len(seconds) or not pictures:
            return None
        places = range(len(seconds)) if sampling is None else sampling.places([at - seconds[0] for at in seconds])
        return {"pictures": [pictures[i] for i in places], "seconds": [seconds[i] for i in places]}
    if row.get("video") and with_paths:
        by_row = {"nframe": int(row.get("nframe") or 0), "fps": float(row.get("fps") or 0)}
        return {"video": row["video"], **(vars(sampling) if sampling else by_row)}
    return None


def _first(cell: str) -> str:
    return next(iter(_listed(cell)), "")


def _listed(cell: str) -> list[str]:
    """The pictures of a cell."""
    if not cell.startswith("["):
        return [cell] if cell else []
    try:
        listed = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return listed if isinstance(listed, list) and all(isinstance(one, str) for one in listed) else []


def _decoded(picture: str) -> Image:
    try:
        return decoded(io.BytesIO(base64.b64decode(picture, validate=True)))
    except binascii.Error as error:
        raise OSError(f"no base64: {error}") from error


def jpeg(picture: str | Image) -> tuple[bytes, tuple[int, int]]:
    """A picture (in base64, or decoded) as JPEG of at most `MOST_JPEG` bytes, and its (width, height) before.

    Raises:
        OSError: it is no picture.
    """
    from PIL import Image

    image = _decoded(picture) if isinstance(picture, str) else picture
    size = image.size
    for side in (_SIDE, _SIDE // 2, _SIDE // 4):
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (85, 70, 50, 30):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= MOST_JPEG:
                return buffer.getvalue(), size
    raise OSError(f"it takes more than {MOST_JPEG} bytes at any size")
