"""Questions to calibrate on: generated scenes of the validation split, or files of pictures and questions.

A file is TSV (columns ``image`` with the picture as base64, or ``image_path``) or JSONL (objects with the same keys);
paths are relative to the file. ``question`` is asked as it stands. ``answer`` may be left out: then what the untouched
model answers counts as right. An answer ``[x1, y1, x2, y2]`` in pixels is a box, right from an overlap of 0.5 on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ivcp_eval.benchmarks.boxes import Box, iou
from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.files import DATASETS, file_digest

#: VLMEvalKit's TSV files name another row's picture by its index, in a cell of up to this many characters.
REFERENCE = 64
_BOX = re.compile(r"\s*\[\s*(\d+(?:\.\d+)?)\s*" + r",\s*(\d+(?:\.\d+)?)\s*" * 3 + r"\]\s*")


@dataclass(frozen=True)
class Question:
    """A picture (PIL, or its path), what is asked about it, and the right answer: a text, a box, or unknown (None).

    A box is (x1, y1, x2, y2) as fractions of the picture.

    Attributes:
        written: the answer as its file has it.
    """

    image: Any
    text: str
    answer: str | Box | None
    written: str = ""

    def is_right(self, answer: str, box: str) -> bool:
        """Whether a model's answer, and the box (`Session.answer`) that was found in it, agree with the right one.

        Raises:
            ValueError: no answer is known.
        """
        if self.answer is None:
            raise ValueError(f"no answer of {self.text!r} is known")
        if not isinstance(self.answer, str):
            numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", box)]
            return len(numbers) == 4 and iou((numbers[0], numbers[1], numbers[2], numbers[3]), self.answer) >= 0.5
        right, given = self.answer.strip().casefold(), answer.strip().casefold()
        # "A. a red circle" is the answer "A"; "12" is not the answer "1".
        return given.startswith(right) and not given[len(right) : len(right) + 1].isalnum()


@dataclass(frozen=True)
class QuestionSet:
    """Questions that are scored together, the name they are reported under, and a checksum of what they were."""

    name: str
    questions: tuple[Question, ...]
    digest: str


def generated(limit: int) -> list[QuestionSet]:
    """The first ``limit`` questions of each task of the embedded model, on scenes of its validation split."""
    from ivcp_eval.lab.tiny import tasks
    from ivcp_eval.lab.tiny.build_benchmarks import BENCHMARKS, benchmark_rows
    from ivcp_eval.lab.tiny.evaluate import questions_of

    sets = []
    for file in BENCHMARKS:
        rows = [
            {name: str(cell) for name, cell in row.items()} for row in islice(benchmark_rows(file, "validation"), limit)
        ]
        questions = tuple(
            Question(one.image, tasks.build_prompt(one.sample), _answer(row["answer"], one.image))
            for row, one in zip(rows, questions_of(rows, file.removeprefix("tiny_").removesuffix(".tsv")), strict=True)
        )
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        sets.append(QuestionSet(file.removesuffix(".tsv"), questions, digest))
    return sets


def from_file(path: Path, limit: int | None = None) -> QuestionSet:
    """The first ``limit`` questions of a file.

    Raises:
        ValueError: the file is a benchmark of this repository or of VLMEvalKit's folder, or holds something else than
            questions. OSError: a picture cannot be decoded.
    """
    _refuse_benchmarks(path)
    rows = _jsonl(path) if path.suffix == ".jsonl" else _tsv(path)
    images: dict[str, Any] = {}
    questions = []
    for number, row in enumerate(rows if limit is None else islice(rows, limit), 1):
        where = f"{path}, row {number}"
        if not row.get("question"):
            raise ValueError(f"{where}: there is no `question`; a row has image or image_path, question, answer")
        image = _image(row, images, path.parent, where)
        images[str(row.get("index", number))] = image
        answer = row.get("answer")
        written = "" if answer is None else str(answer).strip()
        questions.append(Question(image, str(row["question"]), _answer(answer, image), written))
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return QuestionSet(path.name, tuple(questions), file_digest(path))


def _refuse_benchmarks(path: Path) -> None:
    from ivcp_eval.vlmeval_bridge.environment import data_root

    digest = file_digest(path)
    own = next((file for file in DATASETS.glob("*.tsv") if file_digest(file) == digest), None)
    if own is not None or path.resolve().is_relative_to(data_root().resolve()):
        raise ValueError(
            f"{path} is a benchmark ({'datasets/' + own.name if own else 'of VLMEvalKit'}): what is tuned on it cannot "
            "be measured by it. Give questions of a training or validation split"
        )


def _tsv(path: Path) -> Iterable[Mapping[str, Any]]:
    from ivcp_eval.vlmeval_bridge.reading import tsv

    return [{str(name): cell for name, cell in row.items()} for row in tsv.read(path).to_dict("records")]


def _jsonl(path: Path) -> Iterable[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: expected an object {{"image_path": ..., "question": ...}}')
        rows.append(row)
    return rows


def _image(row: Mapping[str, Any], known: Mapping[str, Any], folder: Path, where: str) -> Any:
    cell = str(row.get("image") or "")
    if cell and len(cell) <= REFERENCE:
        if cell in known:
            return known[cell]
        raise ValueError(f"{where}: image {cell!r} is neither base64 nor the index of an earlier row")
    try:
        if cell:
            return decoded(io.BytesIO(base64.b64decode(cell)))
        if row.get("image_path"):
            return decoded(folder / str(row["image_path"]))
    except (OSError, binascii.Error) as error:
        raise OSError(f"{where}: {error}") from error
    raise ValueError(f"{where}: there is no picture; a row has `image` (base64) or `image_path`")


def _answer(cell: Any, image: Any) -> str | Box | None:
    text = "" if cell is None else str(cell)
    match = _BOX.fullmatch(text)
    if match is None:
        return text.strip() or None
    width, height = image.size
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    return (x1 / width, y1 / height, x2 / width, y2 / height)


def kinds(questions: Sequence[Question]) -> str:
    """How many there are, and how many of them without an answer, in words."""
    unknown = sum(question.answer is None for question in questions)
    return f"{len(questions)} questions" + (f", {unknown} of them without an answer" if unknown else "")
