"""Reading VLMEvalKit's stock ``RefCOCO.tsv``: all eight splits in one file, each row with its own copy of the image.

The stock class prefixes every index with the split, so its rows cannot refer to each other and the file has to repeat
each image. It is read in one pass, a few rows at a time, into eight files that hold each image once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ivcp_eval.benchmarks.boxes import Box
from ivcp_eval.benchmarks.refcoco.images import MIN_BASE64, EncodedImage, encode_bytes
from ivcp_eval.benchmarks.refcoco.partial import PartialTsv, is_up_to_date, report_path
from ivcp_eval.benchmarks.refcoco.records import (
    BadRecord,
    ConversionError,
    Problem,
    Record,
    check_box,
    clean_caption,
    finite_number,
)
from ivcp_eval.benchmarks.refcoco.splits import SPLIT_SIZES, split_of_category
from ivcp_eval.benchmarks.refcoco.writer import (
    Options,
    SplitWriter,
    fingerprint_of,
    log_report,
    progress_bar,
    target_of,
)

__all__ = ["convert_stock"]

_log = logging.getLogger(__name__)
_PROMPT = re.compile(
    r"\s*Please provide the bounding box coordinate of the region this sentence describes:\s*<ref>(.*)</ref>\s*",
    re.DOTALL,
)
_BOX_COLUMNS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
_ROWS_AT_A_TIME = 64
Row = Mapping[str, str]


def convert_stock(stock: Path, output_dir: Path, options: Options) -> list[dict[str, Any]]:
    """Split the stock file into one TSV per split; returns their reports.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: a column is missing, an unusable row (unless skipped), a split of the wrong size (unless
            partial ones are allowed), or an existing TSV from other inputs.
        DiskFullError: no space left for one of the files; that one was removed.
    """
    status = stock.stat()
    prints = {
        s: fingerprint_of(options, s, stock=[stock.name, status.st_size, status.st_mtime_ns]) for s in SPLIT_SIZES
    }
    targets = {split: target_of(split, output_dir, options.rule) for split in SPLIT_SIZES}
    ready = {split for split in SPLIT_SIZES if is_up_to_date(targets[split], prints[split], options.skip_bad)}
    reports = [json.loads(report_path(targets[split]).read_text(encoding="utf-8")) for split in sorted(ready)]
    for report in reports:
        log_report(targets[report["name"]], report)
    if len(ready) == len(SPLIT_SIZES):
        return reports
    output_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        reader = _StockReader(options, stack, targets, prints, ready)
        bar = stack.enter_context(progress_bar(sum(SPLIT_SIZES.values()), stock.name))
        for number, row in enumerate(_rows(stock), start=2):  # line 1 is the header
            reader.take(f"row {number}", row)
            bar.update()
        return reports + reader.finish(stock.name)


def _rows(stock: Path) -> Iterator[dict[str, str]]:
    import pandas as pd

    required = {"index", "image", "question", "category"}
    try:
        chunks = pd.read_csv(stock, sep="\t", dtype=str, keep_default_na=False, chunksize=_ROWS_AT_A_TIME)
        for chunk in chunks:
            if not required.issubset(chunk.columns):
                raise ConversionError(
                    f"{stock} has no column {sorted(required.difference(chunk.columns))}; "
                    "is it VLMEvalKit's RefCOCO.tsv?"
                )
            for row in chunk.to_dict("records"):
                yield {str(column): str(cell) for column, cell in row.items()}
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ConversionError(f"{stock} is not a whole TSV file ({error}); download it again") from error


class _StockReader:
    """State of the one pass over the stock file."""

    def __init__(
        self,
        options: Options,
        stack: ExitStack,
        targets: Mapping[str, Path],
        prints: Mapping[str, str],
        ready: set[str],
    ) -> None:
        self._options, self._stack, self._targets, self._prints, self._ready = options, stack, targets, prints, ready
        self._writers: dict[str, SplitWriter] = {}
        self._entries: Counter[str] = Counter()
        self._seen: dict[str, set[str]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}  # image digest -> width, height
        self._answers_are_fractions: bool | None = None
        self._homeless: list[Problem] = []

    def take(self, where: str, row: Row) -> None:
        """Write one row, or note why it is unusable."""
        split = split_of_category(row["category"])
        if split is None:
            problem = Problem(where, row["index"], "?", f"unknown category {row['category']!r}")
            if not self._options.skip_bad:
                raise ConversionError.of_problems("stock file", [problem])
            self._homeless.append(problem)
            return
        self._entries[split] += 1
        if split in self._ready:
            return
        writer = self._writers.get(split) or self._open(split)
        digest = hashlib.sha1(row["image"].encode(), usedforsecurity=False).hexdigest()
        try:
            image = self._image(row["image"], digest)
            record = self._record(where, split, row, digest)
            writer.adopt(record.index, digest)
            writer.add(record, digest, image)
        except BadRecord as error:
            writer.reject(Problem(where, row["index"], digest[:16], str(error)))

    def _open(self, split: str) -> SplitWriter:
        target = self._targets[split]
        if target.exists() and not self._options.overwrite:
            raise ConversionError(f"{target} exists and was made from other inputs or options; --overwrite replaces it")
        part = self._stack.enter_context(PartialTsv(target, self._prints[split]))
        self._writers[split] = SplitWriter(split, part, self._options)
        return self._writers[split]

    def _image(self, cell: str, digest: str) -> EncodedImage:
        """The image, decoded and checked the first time it comes along."""
        if digest in self._sizes:
            return EncodedImage(cell, *self._sizes[digest])
        if len(cell) < MIN_BASE64:
            raise BadRecord("the image cell holds no image; the stock file stores one in every row")
        try:
            image = encode_bytes(base64.b64decode(cell, validate=True))
        except binascii.Error as error:
            raise BadRecord(f"the image is not base64 ({error})") from error
        if image.problem:
            raise BadRecord(image.problem)
        self._sizes[digest] = (image.width, image.height)
        return EncodedImage(cell, image.width, image.height)

    def _record(self, where: str, split: str, row: Row, digest: str) -> Record:
        index = row["index"].strip()
        if not index or re.search(r"\s", index):
            raise BadRecord(f"the index {row['index']!r} is empty or holds white space")
        seen = self._seen.setdefault(split, set())
        if index in seen:
            raise BadRecord(f"the index {index} occurs twice in {split}")
        seen.add(index)
        match = _PROMPT.fullmatch(row["question"])
        if match is None:
            raise BadRecord(f"the question is not the stock prompt around <ref>...</ref>: {row['question'][:120]!r}")
        width, height = self._sizes[digest]
        for column, side in (("width", width), ("height", height)):
            if row.get(column) and _number(row[column], column) != side:
                raise BadRecord(f"the image has {width}x{height} pixels, the row says {column} {row[column]}")
        image_id = posixpath.basename(row.get("image_path", "")) or f"sha1-{digest[:16]}"
        caption = clean_caption(match[1])
        return Record(where, index, image_id, caption, self._box(row, width, height), width, height, "")

    def _box(self, row: Row, width: int, height: int) -> Box:
        """The box in pixels: columns ``bbox_*`` hold pixels; ``answer`` holds fractions or pixels, one in all rows."""
        if all(row.get(column) for column in _BOX_COLUMNS):
            x1, y1, x2, y2 = (_number(row[column], column) for column in _BOX_COLUMNS)
            return check_box(x1, y1, x2, y2, width, height)
        values = [_number(text, "answer") for text in re.split(r"[\s,]+", row.get("answer", "").strip(" []()"))]
        if len(values) != 4:
            raise BadRecord(f"neither {_BOX_COLUMNS} nor answer hold a box: answer {row.get('answer')!r}")
        # Not a guess: a box in pixels whose edges all lie below 1 could only be the corner pixel.
        fractions = max(values) <= 1.0
        if self._answers_are_fractions not in (None, fractions):
            raise BadRecord(f"the answer {values} is in another scale than the earlier rows' answers")
        self._answers_are_fractions = fractions
        x, y = (width, height) if fractions else (1, 1)
        return check_box(values[0] * x, values[1] * y, values[2] * x, values[3] * y, width, height)

    def finish(self, source: str) -> list[dict[str, Any]]:
        """Check the sizes of all splits, then complete the files."""
        wrong = {s: self._entries[s] for s, size in SPLIT_SIZES.items() if self._entries[s] != size}
        if wrong and not self._options.allow_partial:
            sizes = ", ".join(f"{split} {count} instead of {SPLIT_SIZES[split]}" for split, count in wrong.items())
            raise ConversionError(
                f"{source} has splits of the wrong size ({sizes}); download it again, or pass --allow-partial"
            )
        if not self._writers and not self._ready:
            raise ConversionError.of_problems(f"{source} holds no usable row", self._homeless)
        reports = []
        for writer in self._writers.values():
            # A row of no known split could belong to any: every report mentions it.
            writer.problems += self._homeless
            reports.append(writer.finish(source, self._entries[writer.name]))
        return reports


def _number(text: str, column: str) -> float:
    try:
        return finite_number(float(text), column)
    except ValueError as error:  # not a number at all; BadRecord is a ValueError too
        raise BadRecord(f"{column} must hold finite numbers, got {text[:40]!r}") from error
