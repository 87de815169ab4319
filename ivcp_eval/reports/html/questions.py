"""The questions and pictures of chosen samples, from the benchmark's own TSV where that is on this machine."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import json
import math
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import clips
from ivcp_eval.benchmarks.grounding import ground_truth
from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.files import data_root, file_digest, long_cells, remembered
from ivcp_eval.interface.method import Rectangle
from ivcp_eval.interface.records.sheets import drawn_steps, sheet_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MOST_JPEG", "MOST_STEPS", "Question", "Questions", "jpeg"]

MOST_JPEG = 30_000  # bytes
MOST_STEPS = 16  # of a video, in one picture
_SIDE = 480  # pixels of the longer side of a picture
#: An image cell of up to this many characters is the index of the row that has the picture (VLMEvalKit's format).
_REFERENCE = 64


@dataclass(frozen=True)
class Question:
    """One row of a benchmark.

    Attributes:
        text: question, options below it. box: true box of a grounding question. picture: base64; the first of several.
        video: what was shown of a video, as `clips.opened` takes it, or its frames as ``pictures`` in base64.
        missing: why its video cannot be shown.
    """

    text: str
    box: Rectangle | None
    picture: str
    video: Mapping[str, Any] | None = None
    missing: str = ""

    def sheet(self, steps: int) -> Image:
        """At most `MOST_STEPS` of the video's steps as one picture. Raises OSError or ValueError: none can be had."""
        from PIL import Image

        assert self.video is not None
        seconds: Sequence[float]
        if "pictures" in self.video:
            chosen = _drawn(len(self.video["pictures"]), steps)
            frames = [_decoded(self.video["pictures"][i]) for i in chosen]
            seconds = [self.video["seconds"][i] for i in chosen]
        elif self.video.get("frames_sha256"):  # of the frames that were asked about, all of them
            clip = clips.opened(self.video)
            chosen = _drawn(len(clip["video"]), steps)
            frames, seconds = [Image.fromarray(clip["video"][i]) for i in chosen], [clip["seconds"][i] for i in chosen]
        else:
            sampling = _Drawn(self.video.get("nframe", 0), self.video.get("fps", 0.0), steps)
            glance = clips.decode(Path(self.video["video"]), sampling, glancing=True)
            frames, seconds = [Image.fromarray(frame) for frame in glance.frames], glance.seconds
        return sheet_of(frames, seconds, len(frames))


@dataclass(frozen=True)
class _Drawn(clips.Sampling):
    """Of the frames that a sampling takes, those that are drawn for ``steps``."""

    steps: int = 1

    def places(self, times: Sequence[float]) -> list[int]:
        """As the base class."""
        taken = super().places(times)
        return [taken[i] for i in _drawn(len(taken), self.steps)]


def _drawn(frames: int, steps: int) -> list[int]:
    """The first frame of each step that is drawn."""
    joined = math.ceil(frames / steps)
    return [step * joined for step in drawn_steps(steps, MOST_STEPS) if step * joined < frames]


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
        declared = benchmarks.data_file(benchmark).is_file()
        known = benchmarks.load(benchmark) if declared else benchmarks.undeclared(benchmark)
        sampling = None
        if "=" in video:  # "nframe=8, PyAV ..."
            known = replace(known, sampling=video.partition(",")[0])
            sampling = known.frames
        path = known.path or data_root() / f"{known.vlmeval}.tsv"
        if not path.is_file():
            return cls({}, f"{path.name} is not on this machine")
        files = benchmarks.videos(known, path) if sampling else {}
        others = ""
        if not sha256 or benchmarks.content_digest(known, path) != sha256:
            if not (sampling and _is_noted(known, path)):
                among = f", with the {len(files)} videos here," if sampling else ""
                return cls({}, f"{path.name} on this machine{among} is not the file that was asked")
            others = "the videos on this machine are not those that were asked: files are missing, new or changed"
        try:
            rows = {row["index"]: row for row in _rows(path, lambda row: row.get("index") in indices)}
            referenced = {cell for row in rows.values() if 0 < len(cell := row.get("image") or "") <= _REFERENCE}
            pictures = {}
            if referenced:
                for row in _rows(path, lambda row: row.get("index") in referenced):
                    pictures[row["index"]] = row.get("image") or ""
        except (csv.Error, UnicodeDecodeError) as error:
            return cls({}, f"{path.name} cannot be read: {error}")
        boxes = known.kind == "grounding" and known.reference == "answers"
        by_index = {}
        for index, row in rows.items():
            cell = row.get("image") or ""
            box, picture = _box(row) if boxes else None, pictures.get(cell, cell)
            shown, missing = _video(row, picture, sampling), ""
            if shown is None and sampling is not None and row.get("video"):
                file = benchmarks.video_of(row, files)
                where = "is not on this machine" + ("" if known.path else f" (below videos/{known.vlmeval})")
                missing = others if file else f"video {Path(row['video']).name} {where}"
                shown = None if missing else {"video": str(file), **vars(sampling)}
            by_index[index] = Question(_text(row), box, _first(picture), shown, missing)
        return cls(by_index)


def _is_noted(known: benchmarks.Benchmark, path: Path) -> bool:
    """Whether the table is the one that the benchmark's data file notes, whatever its videos are."""
    md5 = remembered(path, "md5", partial(file_digest, algorithm="md5"), str) if known.md5 else ""
    digest = remembered(path, "sha256", file_digest, str) if known.sha256 else ""
    return bool(md5 or digest) and (md5, digest) == (known.md5, known.sha256)


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


def _video(row: Mapping[str, str], cell: str, sampling: clips.Sampling | None) -> Mapping[str, Any] | None:
    """What a row itself shows of a video; None of a picture, and of files of which the set says how they are shown."""
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
    if row.get("video") and row.get("frames_sha256") and sampling is None:
        by_row = {"nframe": int(row.get("nframe") or 0), "fps": float(row.get("fps") or 0)}
        return {"video": row["video"], **by_row, "frames_sha256": row["frames_sha256"]}
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
