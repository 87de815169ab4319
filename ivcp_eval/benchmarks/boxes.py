"""Bounding boxes: how models write them, what frame they are in, how they are compared.

Every model family writes boxes in its own coordinates. Here the format is always *declared* (:data:`FORMATS`), and the
scale inferred from the numbers only where the family's published evaluation does: VLMEvalKit's stock evaluator infers
it for all and reads the absolute pixels of a perfect Qwen2.5-VL answer as thousandths. Whatever the format, the result
is a canonical box: ``(x1, y1, x2, y2)`` as fractions of the original image's width and height.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = [
    "FORMATS",
    "QWEN_MAX_PIXELS",
    "QWEN_MIN_PIXELS",
    "Box",
    "BoxFormat",
    "Frame",
    "box_format",
    "format_answer",
    "iou",
    "parse_answer",
    "smart_resize",
]

Box = tuple[float, float, float, float]
"""``(x1, y1, x2, y2)``: left, top, right, bottom; units as stated where it is used."""
Frame = tuple[int, int]
"""``(width, height)`` in pixels of the picture that pixel coordinates refer to."""

# The limits in Qwen2.5-VL's own preprocessor_config.json, which IVC-Prune's grounding runs also set (config.py:1125).
QWEN_MIN_PIXELS = 4 * 28 * 28
QWEN_MAX_PIXELS = 16384 * 28 * 28
_MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = QWEN_MIN_PIXELS,
    max_pixels: int = QWEN_MAX_PIXELS,
) -> tuple[int, int]:
    """Size to which Qwen2-VL's, Qwen2.5-VL's and Qwen3-VL's image processor resizes an image.

    Both sides become the nearest multiple of ``factor`` (half to even, as Python rounds); if that leaves the range
    ``[min_pixels, max_pixels]``, both sides are first scaled by one common ratio, then rounded down (too big) or up
    (too small). Same rule as ``transformers.models.qwen2_vl.image_processing_qwen2_vl.smart_resize`` (5.23.0), which
    the tests compare it with; repeated here because importing that module loads torch.

    Args:
        height, width: of the original image in pixels, both positive.
        factor: patch size times merge size: 28 for Qwen2/2.5-VL, 32 for Qwen3-VL.
        min_pixels, max_pixels: allowed area of the result in pixels.

    Returns:
        ``(height, width)`` of the resized image in pixels.

    Raises:
        ValueError: a side or limit is not positive, the limits are inverted, or one side is more than 200 times the
            other; the real processor refuses such an image too.
    """
    if min(height, width, factor, min_pixels) <= 0 or min_pixels > max_pixels:
        raise ValueError(
            "sides, factor and limits must be positive and min_pixels <= max_pixels; got "
            f"{height=}, {width=}, {factor=}, {min_pixels=}, {max_pixels=}"
        )
    ratio = max(height, width) / min(height, width)
    if ratio > _MAX_ASPECT_RATIO:
        raise ValueError(
            f"an image of {width}x{height} pixels has aspect ratio {ratio:.1f}; Qwen's processor accepts at most "
            f"{_MAX_ASPECT_RATIO}"
        )
    nearest = (round(height / factor) * factor, round(width / factor) * factor)
    area = nearest[0] * nearest[1]
    if area > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return nearest


_NUMBER = r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))"
_FOUR = r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]"
_PLAIN = re.compile(_FOUR)
_POINT = r"\(\s*" + _NUMBER + r"\s*,\s*" + _NUMBER + r"\s*\)"
_SYNTAX: dict[str, tuple[re.Pattern[str], ...]] = {
    "json": (re.compile(r'"bbox_2d"\s*:\s*' + _FOUR),),
    "plain": (_PLAIN,),
    "points": (re.compile(_POINT + r"\s*,\s*" + _POINT),),
    # A tokenizer that skips special tokens drops the <|det|> pair and leaves the brackets.
    "det": (re.compile(r"<\|det\|>\s*\[?\s*" + _FOUR), _PLAIN),
}


@dataclass(frozen=True)
class BoxFormat:
    """How one model family writes a box.

    Attributes:
        name: key in :data:`FORMATS`.
        syntax: ``"json"`` = ``"bbox_2d": [x1, y1, x2, y2]``; ``"plain"`` = ``[x1, y1, x2, y2]``, also in double
            brackets; ``"det"`` = the same between ``<|det|>`` and ``<|/det|>``; ``"points"`` = ``(x1,y1),(x2,y2)``.
        full_scale: the number that stands for the right or bottom edge of the image; ``None`` = coordinates are
            pixels of a frame that the caller names (for Qwen2.5-VL the resized image).
        fractions_below: coordinates that add up to less than this are fractions of the image, where the family's
            published evaluation reads them so; 0 if it does not.
    """

    name: str
    syntax: str
    full_scale: float | None
    fractions_below: float = 0.0

    @property
    def in_pixels(self) -> bool:
        return self.full_scale is None


FORMATS: dict[str, BoxFormat] = {
    fmt.name: fmt
    for fmt in (
        # QwenLM/Qwen2.5-VL README "JSON format": absolute pixels of the resized image.
        BoxFormat("qwen2_5_vl", "json", None),
        # QwenLM/Qwen2-VL README: <|box_start|>(x1,y1),(x2,y2)<|box_end|>, 0 to 1000.
        BoxFormat("qwen2_vl", "points", 1000.0),
        # QwenLM/Qwen3-VL, cookbooks/2d_grounding: relative coordinates, 0 to 1000.
        BoxFormat("qwen3_vl", "json", 1000.0),
        # OpenGVLab/InternVL, internvl_chat/eval/refcoco: [[x1, y1, x2, y2]], 0 to 1000 if they add up to 4 or more.
        BoxFormat("internvl", "plain", 1000.0, fractions_below=4.0),
        # deepseek-ai/DeepSeek-VL2 README: <|det|>[[x1, y1, x2, y2]]<|/det|>, 0 to 999. Its evaluation is not published;
        # that of IVC-Prune (FireRedTeam/IVC-Prune @ 03afd9c) takes sums below 4 for fractions, as InternVL's does.
        BoxFormat("deepseek_vl2", "det", 999.0, fractions_below=4.0),
        BoxFormat("unit", "plain", 1.0),
    )
}


def box_format(name: str) -> BoxFormat:
    """The declared format called ``name``.

    Raises:
        ValueError: there is no such format.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown box format {name!r}; known: {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def _scales(fmt: BoxFormat, frame: Frame | None) -> tuple[float, float]:
    if fmt.full_scale is not None:
        return fmt.full_scale, fmt.full_scale
    if frame is None or min(frame) <= 0:
        raise ValueError(
            f"box format {fmt.name!r} is in pixels: name the frame as (width, height) with positive sides, got {frame}"
        )
    return float(frame[0]), float(frame[1])


def parse_answer(text: object, fmt: BoxFormat, frame: Frame | None = None) -> Box | None:
    """First box in a model's answer, as fractions of the image's width and height.

    Nothing is repaired: coordinates are neither clipped nor swapped, and a number too large for the declared scale
    stays too large (such a box simply overlaps nothing).

    Args:
        text: the answer; anything but a string (``None``, the NaN of an empty table cell) holds no box.
        fmt: declared format.
        frame: ``(width, height)`` the pixels refer to; needed by pixel formats, ignored by others.

    Returns:
        The canonical box, or ``None`` if the answer holds no box in this format.

    Raises:
        ValueError: a pixel format without a frame; a mistake of the caller, not of the model.
    """
    x_scale, y_scale = _scales(fmt, frame)
    if not isinstance(text, str):
        return None
    for pattern in _SYNTAX[fmt.syntax]:
        match = pattern.search(text)
        if match:
            x1, y1, x2, y2 = (float(number) for number in match.groups())
            if x1 + y1 + x2 + y2 < fmt.fractions_below:
                x_scale = y_scale = 1.0
            box = (x1 / x_scale, y1 / y_scale, x2 / x_scale, y2 / y_scale)
            return box if all(map(math.isfinite, box)) else None  # hundreds of digits overflow to infinity
    return None


def format_answer(box: Box, fmt: BoxFormat, frame: Frame | None = None) -> str:
    """The answer a model of this format gives for a canonical ``box`` (inverse of :func:`parse_answer`).

    Coordinates are rounded to whole numbers as the models do, except on the 0-to-1 scale (six decimals).

    Raises:
        ValueError: a pixel format without a frame.
    """
    x_scale, y_scale = _scales(fmt, frame)
    values = (box[0] * x_scale, box[1] * y_scale, box[2] * x_scale, box[3] * y_scale)
    inner = ", ".join(f"{v:.6f}" if fmt.full_scale == 1.0 else str(round(v)) for v in values)
    if fmt.syntax == "json":
        return f'```json\n[\n\t{{"bbox_2d": [{inner}], "label": "object"}}\n]\n```'
    if fmt.syntax == "points":
        x1, y1, x2, y2 = inner.split(", ")
        return f"<|object_ref_start|>object<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    if fmt.syntax == "det":
        return f"<|ref|>object<|/ref|><|det|>[[{inner}]]<|/det|>"
    return f"[{inner}]" if fmt.full_scale == 1.0 else f"[[{inner}]]"


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes in the same units, in ``[0, 1]``.

    A box without area (empty, inverted) has IoU 0 with everything, itself included.
    """
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second) if box[2] > box[0] and box[3] > box[1]]
    if len(areas) < 2:
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / (areas[0] + areas[1] - intersection)
