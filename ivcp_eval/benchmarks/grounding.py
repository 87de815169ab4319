"""Scoring of referring-expression grounding: does the predicted box overlap the true one?

Acc@t is the share of expressions whose predicted box has IoU >= t with the ground truth (t = 0.5 is the metric of
RefCOCO, RefCOCO+ and RefCOCOg). One unreadable prediction is one miss; it is counted, and it never stops the scoring.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ivcp_eval.benchmarks.boxes import Box, BoxFormat, Frame, iou, parse_answer

__all__ = [
    "IOU_THRESHOLDS",
    "SIZES",
    "TOLERANCE",
    "GroundTruth",
    "GroundingScore",
    "ScoredBox",
    "ground_truth",
    "score",
    "size_of",
]

IOU_THRESHOLDS = (0.5, 0.75, 0.9)
SIZES = ("small", "medium", "large")
# COCO's limits (pycocotools, Params.areaRng). COCO measures the mask; here it is the box, which every source has.
_SMALL, _MEDIUM = 32.0**2, 96.0**2
# IoU is a quotient of rounded products: a box made to overlap by exactly one half must not miss by 1e-16.
TOLERANCE = 1e-9
# How far (as a fraction of the image) a box may stick out before it counts as "outside": rounding sticks out a little.
_OUTSIDE = 0.02


@dataclass(frozen=True)
class GroundTruth:
    """One referring expression's true box.

    Attributes:
        index: the row's index in the data set, as text.
        box: fractions of the original image's width and height.
        width, height: original image in pixels.
        answer_frame: ``(width, height)`` of the frame in which the data set states the answer: the original image,
            or the resized one if the file was converted with ``--qwen25``.
    """

    index: str
    box: Box
    width: int
    height: int
    answer_frame: Frame

    @property
    def area(self) -> float:
        """Area of the box in pixels of the original image."""
        return (self.box[2] - self.box[0]) * self.width * (self.box[3] - self.box[1]) * self.height


def ground_truth(row: Mapping[str, Any]) -> GroundTruth:
    """Read one row of a TSV written by ``convert_to_tsv.py``.

    Args:
        row: columns ``index``, ``answer`` (JSON list ``[x1, y1, x2, y2]`` in pixels of the answer frame),
            ``answer_width``, ``answer_height``, ``width``, ``height``; numbers or their text.

    Raises:
        ValueError: a column is missing or unusable, or the box has no area; the message names the row.
    """
    name = f"row {row.get('index', '(without index)')}"
    try:
        index = str(row["index"])
        width, height, frame_width, frame_height = (
            int(row[column]) for column in ("width", "height", "answer_width", "answer_height")
        )
        answer = row["answer"]
        values = json.loads(answer) if isinstance(answer, str) else answer
        x1, y1, x2, y2 = (float(value) for value in values)
    except KeyError as error:
        raise ValueError(f"{name}: no column {error}; convert the data set with convert_to_tsv.py") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: unusable ground truth ({error}); convert the data set again") from error
    if min(width, height, frame_width, frame_height) <= 0:
        raise ValueError(f"{name}: image {width}x{height}, answer frame {frame_width}x{frame_height}: no size")
    box = (x1 / frame_width, y1 / frame_height, x2 / frame_width, y2 / frame_height)
    if not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"{name}: the true box {[x1, y1, x2, y2]} has no area")
    return GroundTruth(index, box, width, height, (frame_width, frame_height))


def size_of(truth: GroundTruth) -> str:
    """``"small"`` (box below 32x32 original pixels), ``"medium"`` (below 96x96) or ``"large"``."""
    if truth.area < _SMALL:
        return "small"
    return "medium" if truth.area < _MEDIUM else "large"


@dataclass(frozen=True)
class ScoredBox:
    """One scored prediction; ``box`` is canonical, ``None`` if the prediction could not be read (then ``iou`` is 0)."""

    index: str
    box: Box | None
    iou: float
    size: str

    def hit(self, threshold: float = 0.5) -> bool:
        """Whether the overlap reaches ``threshold`` (inclusive)."""
        return self.iou >= threshold - TOLERANCE

    @property
    def outside(self) -> bool:
        """Whether the box leaves the image by more than rounding can explain."""
        return self.box is not None and (min(self.box) < -_OUTSIDE or max(self.box) > 1 + _OUTSIDE)


@dataclass(frozen=True)
class GroundingScore:
    """All scored predictions of one data set, in the order given."""

    samples: tuple[ScoredBox, ...]

    def summary(self) -> dict[str, Any]:
        """Totals over all samples plus the same numbers per object size.

        ``Acc@0.5``, ``Acc@0.75``, ``Acc@0.9`` are percentages of *all* expressions, ``mean_iou`` is in [0, 1] and
        counts unreadable predictions as 0, ``unparsable`` counts them, ``outside_image`` counts boxes that leave the
        image (many of them point to a wrongly declared box format). A size without objects has ``n`` 0 and ``None``
        for what cannot be computed.
        """
        by_size = {size: _totals([s for s in self.samples if s.size == size]) for size in SIZES}
        return {**_totals(self.samples), "by_size": by_size}

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per sample (index, size, box or ``None``, IoU, hit at 0.5), for tables and paired tests."""
        return [
            {"index": s.index, "size": s.size, "box": s.box, "iou": s.iou, "hit": int(s.hit())} for s in self.samples
        ]


def _totals(samples: Sequence[ScoredBox]) -> dict[str, Any]:
    n = len(samples)
    totals: dict[str, Any] = {"n": n}
    for threshold in IOU_THRESHOLDS:
        totals[f"Acc@{threshold}"] = 100.0 * sum(s.hit(threshold) for s in samples) / n if n else None
    totals["mean_iou"] = math.fsum(s.iou for s in samples) / n if n else None
    totals["unparsable"] = sum(s.box is None for s in samples)
    totals["outside_image"] = sum(s.outside for s in samples)
    return totals


def score(
    pairs: Iterable[tuple[GroundTruth, object]],
    fmt: BoxFormat,
    frame_of: Callable[[GroundTruth], Frame] | None = None,
) -> GroundingScore:
    """Score predictions against ground truth.

    Args:
        pairs: ground truth and the model's answer text; anything but text counts as unreadable.
        fmt: the declared format of *all* answers.
        frame_of: for pixel formats, the frame ``(width, height)`` of the answers to one sample, e.g.
            ``lambda t: t.answer_frame`` for a ``--qwen25`` file or the size from
            :func:`ivcp_eval.benchmarks.boxes.smart_resize`.

    Raises:
        ValueError: no samples, an index twice, or a pixel format without ``frame_of``.
    """
    if fmt.in_pixels and frame_of is None:
        raise ValueError(f"box format {fmt.name!r} is in pixels: pass frame_of, the frame is never guessed")
    samples: dict[str, ScoredBox] = {}
    for truth, prediction in pairs:
        if truth.index in samples:
            raise ValueError(f"index {truth.index} is scored twice; indices must be unique")
        box = parse_answer(prediction, fmt, frame_of(truth) if frame_of else None)
        overlap = 0.0 if box is None else iou(box, truth.box)
        samples[truth.index] = ScoredBox(truth.index, box, overlap, size_of(truth))
    if not samples:
        raise ValueError("no samples to score; is the data set or the prediction file empty?")
    return GroundingScore(tuple(samples.values()))
