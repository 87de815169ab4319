"""One referring expression: its checks, its answer box, its line in the TSV."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from ivcp_eval.benchmarks.boxes import QWEN_MAX_PIXELS, QWEN_MIN_PIXELS, Box, Frame, smart_resize

__all__ = [
    "COLUMNS",
    "BadRecord",
    "ConversionError",
    "FrameRule",
    "Problem",
    "Record",
    "check_box",
    "clean_caption",
    "finite_number",
]

COLUMNS = (
    "index",  # the source's own id of the expression
    "image",  # base64 of the original file, or the index of the row that holds it (shorter than 64 characters)
    "image_path",  # name under which VLMEvalKit unpacks the image: one lossless PNG per image, not one per row
    "image_id",  # the image's file name; the cluster key for statistics
    "question",  # the raw referring expression
    "answer",  # JSON list [x1, y1, x2, y2], pixels of the answer frame
    "answer_width",
    "answer_height",
    "width",  # original image
    "height",
    "object_id",  # COCO annotation id of the object, if the source has it
    "split",
)
# Boxes in COCO touch the border and overshoot it by rounding; further out it is another image's box.
_BORDER_PIXELS = 1.0
# pandas.read_csv, with which VLMEvalKit loads the file, turns exactly these cells into "missing" (pandas 3.1 docs).
_READ_AS_MISSING = frozenset(
    [
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    ]
)


class BadRecord(ValueError):
    """One entry of the source cannot become a row; the message says why, the caller knows which entry."""


@dataclass(frozen=True)
class Problem:
    """One unusable entry: where it is in the source (``images[17]``, ``line 18``), its id, its image, what is wrong."""

    where: str
    index: str
    image: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where} (id {self.index}, image {self.image}): {self.reason}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class ConversionError(ValueError):
    """A source cannot be converted; ``problems`` lists the unusable entries, if it is about entries."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of_problems(cls, source: str, problems: Sequence[Problem], shown: int = 10) -> ConversionError:
        lines = [f"{source}: {len(problems)} unusable entries; nothing was left out silently:"]
        lines += [f"  {problem}" for problem in problems[:shown]]
        if len(problems) > shown:
            lines.append(f"  ... and {len(problems) - shown} more")
        lines.append("Repair the source, or pass --skip-bad to leave these out and have them listed in the report.")
        return cls("\n".join(lines), problems)


@dataclass(frozen=True)
class Record:
    """A checked referring expression.

    Attributes:
        where: place in the source, for messages.
        index: unique id, an integer for MDETR files.
        image_id: file name of the image relative to the images folder, with ``/``.
        question: the expression, one line.
        box: ``(x1, y1, x2, y2)`` in pixels of the original image.
        width, height: original image in pixels.
        object_id: id of the described object, or empty.
    """

    where: str
    index: str
    image_id: str
    question: str
    box: Box
    width: int
    height: int
    object_id: str

    def problem(self, reason: str) -> Problem:
        return Problem(self.where, self.index, self.image_id, reason)

    def line(self, image_cell: str, rule: FrameRule, split: str) -> str:
        """The record's TSV line, with its line end.

        Written by hand: ``csv.writer`` looks at every character of the base64 cell and takes 4 ms per image. Only
        the text cells can need quotes; tabs and line ends are gone since :func:`clean_caption`.

        Raises:
            BadRecord: the box loses its area in the answer frame, or the frame cannot be computed.
        """
        answer, frame = rule.answer(self)
        cells = (
            self.index,
            image_cell,
            _quote(f"{self.image_id}.png"),
            _quote(self.image_id),
            _quote(self.question),
            json.dumps(answer),
            str(frame[0]),
            str(frame[1]),
            str(self.width),
            str(self.height),
            self.object_id,
            split,
        )
        return "\t".join(cells) + "\n"


def _quote(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if '"' in cell else cell


@dataclass(frozen=True)
class FrameRule:
    """In which frame answers are stated: the original image, or what Qwen2.5-VL's processor resizes it to.

    Raises:
        ValueError: a side or limit is not positive, or the limits are inverted.
    """

    qwen25: bool = False
    patch_size: int = 28
    min_pixels: int = QWEN_MIN_PIXELS
    max_pixels: int = QWEN_MAX_PIXELS

    def __post_init__(self) -> None:
        if min(self.patch_size, self.min_pixels) <= 0 or self.min_pixels > self.max_pixels:
            raise ValueError(
                "patch size and pixel limits must be positive and min_pixels <= max_pixels; got "
                f"{self.patch_size}, {self.min_pixels}, {self.max_pixels}"
            )

    def frame(self, width: int, height: int) -> Frame:
        """``(width, height)`` of the answer frame.

        Raises:
            BadRecord: Qwen's processor refuses an image this long and thin.
        """
        if not self.qwen25:
            return width, height
        try:
            new_height, new_width = _resized(height, width, self.patch_size, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise BadRecord(str(error)) from error
        return new_width, new_height

    def departs_from_released(self, width: int, height: int) -> bool:
        """Whether the frame differs from the released converter's, which rounds each side and ignores the limits."""
        plain = (round(width / self.patch_size) * self.patch_size, round(height / self.patch_size) * self.patch_size)
        return self.qwen25 and self.frame(width, height) != plain

    def answer(self, record: Record) -> tuple[list[float], Frame]:
        """``([x1, y1, x2, y2], (width, height))``: the box in pixels of the answer frame, and that frame.

        Resized coordinates are rounded to whole pixels after multiplying by ``new / old``, as in
        FireRedTeam/IVC-Prune@03afd9c ``convert_to_tsv.py``; original ones keep COCO's decimals.

        Raises:
            BadRecord: rounding leaves a box without area, which no prediction could match.
        """
        frame = self.frame(record.width, record.height)
        if not self.qwen25:
            return [round(value, 6) for value in record.box], frame
        scales = (frame[0] / record.width, frame[1] / record.height)
        box = [round(value * scale) for value, scale in zip(record.box, scales * 2, strict=True)]
        if box[2] <= box[0] or box[3] <= box[1]:
            raise BadRecord(f"the box {list(record.box)} has no area left in the resized frame: {box}")
        return [*box], frame


# Splits hold thousands of expressions but few image sizes.
_resized = lru_cache(maxsize=4096)(smart_resize)


def clean_caption(caption: object) -> str:
    """The expression on one line, safe from being read back as a missing value.

    Line ends and tabs become spaces; a caption that ``pandas.read_csv`` takes for a missing value (``null``, ``NA``,
    ...) gets a trailing space, which prevents that. Anything else stays as it is.

    Raises:
        BadRecord: not text, or nothing but white space.
    """
    if not isinstance(caption, str):
        raise BadRecord(f"the caption must be text, got {caption!r}")
    if not caption.strip():
        raise BadRecord("the caption is empty")
    line = re.sub(r"[\t\r\n\v\f\x00\x85\u2028\u2029]+", " ", caption)
    return f"{line} " if line in _READ_AS_MISSING else line


def finite_number(value: Any, what: str) -> float:
    """``value`` as a float; :class:`BadRecord` if it is text, a truth value, NaN, infinite or too large."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRecord(f"{what} must hold finite numbers, got {reprlib.repr(value)}")
    return number


def check_box(x1: float, y1: float, x2: float, y2: float, width: int, height: int) -> Box:
    """The box (pixels), if it is one and lies in an image of ``width`` x ``height`` pixels.

    It may overshoot the border by one pixel (COCO's rounding); such a box is kept as it is.

    Raises:
        BadRecord: the area is zero, or the box leaves the image.
    """
    values = (x1, y1, x2, y2)
    if x2 <= x1 or y2 <= y1:
        raise BadRecord(f"the box {list(values)} (x1, y1, x2, y2) has zero area")
    if min(x1, y1) < -_BORDER_PIXELS or x2 > width + _BORDER_PIXELS or y2 > height + _BORDER_PIXELS:
        raise BadRecord(f"the box {list(values)} (x1, y1, x2, y2) leaves the image of {width}x{height} pixels")
    return values
