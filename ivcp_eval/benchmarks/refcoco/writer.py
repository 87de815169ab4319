"""What one output file is made with: options, its name, its fingerprint, and the writer of its rows and report."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ivcp_eval.benchmarks.refcoco.images import EncodedImage, available_cores
from ivcp_eval.benchmarks.refcoco.partial import PartialTsv, report_path
from ivcp_eval.benchmarks.refcoco.records import BadRecord, ConversionError, FrameRule, Problem, Record
from ivcp_eval.benchmarks.refcoco.splits import SPLIT_SIZES

__all__ = ["Options", "SplitWriter", "fingerprint_of", "log_report", "progress_bar", "target_of"]

_log = logging.getLogger(__name__)
_FORMAT_VERSION = 1
_EXAMPLES = 20


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        rule: frame in which answers are stated.
        skip_bad: leave unusable entries out and list them in the report, instead of refusing the file.
        allow_partial: accept a file that is none of the eight splits, or has another size.
        overwrite: replace a TSV made from other inputs.
        workers: processes that read pictures.
    """

    rule: FrameRule = field(default_factory=FrameRule)
    skip_bad: bool = False
    allow_partial: bool = False
    overwrite: bool = False
    workers: int = field(default_factory=available_cores)


def target_of(name: str, output_dir: Path, rule: FrameRule) -> Path:
    """``RefCOCO_val`` -> ``<output_dir>/RefCOCO_val.tsv`` or ``<output_dir>/RefCOCO_val_for_qwen25vl.tsv``."""
    return output_dir / f"{name}{'_for_qwen25vl' if rule.qwen25 else ''}.tsv"


def progress_bar(total: int, name: str) -> tqdm[Any]:
    """A bar on the terminal; silent where there is none (logs, tests)."""
    return tqdm(total=total, desc=name, unit="expr", disable=None)


def fingerprint_of(options: Options, name: str, **inputs: Any) -> str:
    """Digest of everything the output depends on: equal fingerprints mean equal files."""
    content = {
        "version": _FORMAT_VERSION,
        "name": name,
        "rule": asdict(options.rule),
        **inputs,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class SplitWriter:
    """Writes one split's rows through a :class:`PartialTsv`, each image in the first row that shows it."""

    def __init__(self, name: str, part: PartialTsv, options: Options) -> None:
        self.name = name
        self._part = part
        self._options = options
        self._holder: dict[str, str] = {}  # image key -> index of the row that holds the image
        self._done = part.done
        self._rows = 0
        self._past_border = 0
        self._unlike_released: dict[str, str] = {}
        self.problems: list[Problem] = []

    def has_image(self, key: str) -> bool:
        return key in self._holder

    def adopt(self, index: str, key: str) -> None:
        """Note that an earlier, interrupted run wrote the image ``key`` into row ``index``, if it did."""
        if self._done.get(index):
            self._holder.setdefault(key, index)

    def add(self, record: Record, key: str, image: EncodedImage | None = None) -> None:
        """Write a record; ``image`` is needed if :meth:`has_image` is false and the row is not there yet.

        Raises:
            BadRecord: the image is unusable, or the answer cannot be stated in the chosen frame.
        """
        if record.index not in self._done:
            cell = self._holder.get(key)
            if cell is None:
                assert image is not None, "the first row of an image needs it"
                cell = _checked(image, record)
            self._part.write(record.line(cell, self._options.rule, self.name))
            self._holder.setdefault(key, record.index)
        self._count(record)

    def _count(self, record: Record) -> None:
        self._rows += 1
        x1, y1, x2, y2 = record.box
        self._past_border += min(x1, y1) < 0 or x2 > record.width or y2 > record.height
        if self._options.rule.departs_from_released(record.width, record.height):
            frame = self._options.rule.frame(record.width, record.height)
            self._unlike_released[record.image_id] = f"{record.width}x{record.height} -> {frame[0]}x{frame[1]}"

    def reject(self, problem: Problem) -> None:
        """Note an unusable entry.

        Raises:
            ConversionError: unusable entries are not to be skipped.
        """
        if not self._options.skip_bad:
            raise ConversionError.of_problems(self.name, [problem])
        self.problems.append(problem)

    def finish(self, source: str, entries: int) -> dict[str, Any]:
        """Complete the file and its report.

        Raises:
            ConversionError: no usable entry was found.
        """
        if not self._rows:
            raise ConversionError.of_problems(f"{self.name}: no usable entry", self.problems)
        expected = SPLIT_SIZES.get(self.name)
        report = self._part.finish(
            {
                "name": self.name,
                "source": source,
                "complete": self._rows == entries and expected in (None, entries),
                "rows": self._rows,
                "expected_rows": expected,
                "entries_in_source": entries,
                "images": len(self._holder),
                "answer_frame": asdict(self._options.rule),
                "boxes_past_border_within_a_pixel": self._past_border,
                # Here the released converter states answers in a frame that the model never sees.
                "images_with_frame_unlike_released_converter": {
                    "count": len(self._unlike_released),
                    "examples": dict(list(self._unlike_released.items())[:_EXAMPLES]),
                },
                "skipped": len(self.problems),
                "skipped_entries": [problem.as_dict() for problem in self.problems],
            }
        )
        log_report(self._part.target, report)
        return report


def log_report(target: Path, report: dict[str, Any]) -> None:
    """Say what a finished file holds, and warn where it is not a whole split."""
    _log.info("%s: %d expressions, %d images, md5 %s", target, report["rows"], report["images"], report["md5"])
    if report["expected_rows"] not in (None, report["entries_in_source"]):
        _log.warning(
            "WARNING: the source has %d of the %d expressions of %s; scores on it are not comparable",
            report["entries_in_source"], report["expected_rows"], report["name"],
        )  # fmt: skip
    if report["skipped"]:
        _log.warning(
            "WARNING: %d of %d entries were LEFT OUT of %s; scores on it are not comparable. Listed in %s",
            report["skipped"], report["entries_in_source"], target.name, report_path(target),
        )  # fmt: skip
    unlike = report["images_with_frame_unlike_released_converter"]["count"]
    if unlike:
        _log.warning(
            "note: for %d images Qwen's smart_resize differs from plain rounding (pixel limits or extreme aspect "
            "ratio); answers follow smart_resize, see %s",
            unlike, report_path(target),
        )  # fmt: skip


def _checked(image: EncodedImage, record: Record) -> str:
    if image.problem:
        raise BadRecord(image.problem)
    if (image.width, image.height) != (record.width, record.height):
        raise BadRecord(
            f"the image has {image.width}x{image.height} pixels, the annotation says {record.width}x{record.height}"
        )
    return image.data
