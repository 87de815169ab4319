"""The questions and pictures of chosen samples, from the benchmark's own TSV where that is on this machine."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks.grounding import ground_truth
from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.files import data_root, file_digest, long_cells, remembered
from ivcp_eval.interface.method import Rectangle

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
    """

    text: str
    box: Rectangle | None
    picture: str


@dataclass(frozen=True)
class Questions:
    """Of one benchmark, by index; ``missing`` says why there are none."""

    by_index: Mapping[str, Question]
    missing: str = ""

    @classmethod
    def read(cls, benchmark: str, sha256: str, indices: Collection[str]) -> Questions:
        """The rows with these indices, of the very file that was asked; pictures of other rows are never held.

        Args:
            benchmark: its name. sha256: of its file, as the results state it.
        """
        known = benchmarks.load(benchmark) if benchmarks.data_file(benchmark).is_file() else None
        path = (known and known.path) or data_root() / f"{known.vlmeval if known else benchmark}.tsv"
        if not path.is_file():
            return cls({}, f"{path.name} is not on this machine")
        if not sha256 or remembered(path, "sha256", file_digest, str) != sha256:
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
            by_index[index] = Question(_text(row), _box(row) if boxes else None, _first(pictures.get(cell, cell)))
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


def _first(cell: str) -> str:
    if not cell.startswith("["):
        return cell
    try:
        listed = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""
    return listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else ""


def jpeg(picture: str) -> tuple[bytes, tuple[int, int]]:
    """A picture in base64 as JPEG of at most `MOST_JPEG` bytes without metadata, and its (width, height) before.

    Raises:
        OSError: it is no picture.
    """
    from PIL import Image

    try:
        image = decoded(io.BytesIO(base64.b64decode(picture, validate=True)))
    except binascii.Error as error:
        raise OSError(f"no base64: {error}") from error
    size = image.size
    for side in (_SIDE, _SIDE // 2, _SIDE // 4):
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in (85, 70, 50, 30):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= MOST_JPEG:
                return buffer.getvalue(), size
    raise OSError(f"it takes more than {MOST_JPEG} bytes at any size")
