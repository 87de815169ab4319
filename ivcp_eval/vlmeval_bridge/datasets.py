"""Our benchmarks as VLMEvalKit data sets: stock classes where they fit, one of our own for grounding.

The module imports VLMEvalKit; go through `ivcp_eval.vlmeval_bridge`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import string
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.dataset.image_mcq import ImageMCQDataset
from vlmeval.dataset.image_vqa import ImageVQADataset
from vlmeval.dataset.image_yorn import ImageYORNDataset
from vlmeval.smp import dump, get_intermediate_file_path

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks.boxes import FORMATS
from ivcp_eval.benchmarks.grounding import ground_truth, score
from ivcp_eval.benchmarks.lists import in_order, items
from ivcp_eval.files import file_digest
from ivcp_eval.vlmeval_bridge.reading import answers, tsv, videos
from ivcp_eval.vlmeval_bridge.reading.pictures import Unpacking

REQUIRED = {
    "grounding": ("index", "image", "question", "answer", "width", "height"),
    "mcq": ("index", "image", "question", "answer", "A", "B"),
    "yes_no": ("index", "image", "question", "answer"),
    "short_answer": ("index", "image", "question", "answer"),
    "list": ("index", "image", "question", "answer"),
}


def read_tsv(path: Path, kind: str, answered: bool = True) -> pd.DataFrame:
    """A benchmark TSV with its columns checked; every cell as text, nothing turned into NaN.

    Args:
        answered: whether it holds answers; without, predictions are compared with the baseline's.

    Raises:
        FileNotFoundError: no such file. ValueError: columns missing, no rows, no picture or answer, an index twice; it
            says which. tsv.BadTable: see there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; see `ivcp data` for where it comes from")
    table = tsv.read(path)
    shown = "video" if "video" in table else "image"
    required = [shown if column == "image" else column for column in REQUIRED[kind] if answered or column != "answer"]
    missing = [column for column in required if column not in table]
    if missing:
        raise ValueError(
            f"{path}: a {kind} benchmark needs the columns {', '.join(required)}; missing: {', '.join(missing)}; "
            f"found: {', '.join(table.columns)}"
        )
    if table.empty:
        raise ValueError(f"{path}: the table has no rows")
    twice = table["index"][table["index"].duplicated()]
    if len(twice):
        raise ValueError(f"{path}: {len(twice)} index values occur twice, e.g. {twice.iloc[0]!r}; they must be unique")
    for column in (shown, "answer") if answered else (shown,):
        empty = table["index"][table[column] == ""]
        if len(empty):
            raise ValueError(f"{path}: {len(empty)} rows have no {column}, e.g. the row with index {empty.iloc[0]!r}")
    return table


class _Shipped(Unpacking, ImageBaseDataset):
    """Reads the TSV that a declared benchmark names, from ``datasets/`` or from VLMEvalKit's data root.

    Cells are text from here to the score. Only options and hints that are empty are NaN, VLMEvalKit's sign for none.
    """

    KIND: ClassVar[str]
    FILE: ClassVar[Path | None] = None  # in place of the declared one: `of_file`

    # VLMEvalKit filters keyword arguments by signature, so the parameter must be named.
    def __init__(self, dataset: str, skip_noimg: bool = True, **kwargs: Any) -> None:
        super().__init__(dataset=dataset, skip_noimg=skip_noimg)
        self.data["index"] = self._indices  # "007" is not 7
        self.meta_only = False  # pictures come from `dump_image`, which has none for a video file

    @classmethod
    def supported_datasets(cls) -> list[str]:
        """Declared benchmarks of this kind that VLMEvalKit itself does not know."""
        loaded = [benchmarks.load(name) for name in benchmarks.names()]
        return [b.vlmeval for b in loaded if b.kind == cls.KIND and not b.url]

    def load_data(self, dataset: str) -> pd.DataFrame:
        """The TSV; images are cached under its checksum, so another version of the file never meets stale pictures."""
        from ivcp_eval.vlmeval_bridge.environment import data_root

        benchmark = benchmarks.load(dataset)
        path = self.FILE or benchmark.path or data_root() / f"{dataset}.tsv"
        table = read_tsv(path, self.KIND, benchmark.reference == "answers")
        self.img_root = str(data_root() / "images" / f"{dataset}-{file_digest(path)[:12]}")
        self._indices = list(table["index"])
        absent = [str(column) for column in table if column in (*string.ascii_uppercase, "hint")]
        table[absent] = tsv.typed(table[absent], absent)
        return table


class ShippedMCQ(_Shipped, ImageMCQDataset):
    """Multiple choice, scored by VLMEvalKit's own evaluator."""

    KIND = "mcq"

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> Any:
        """As the base class, on the text of the file: indices are text in the table that it compares with."""
        return super().evaluate(str(answers.pickled(Path(eval_file))), **judge_kwargs)


class ShippedYesNo(_Shipped, ImageYORNDataset):
    """Yes/no, scored by VLMEvalKit's own evaluator."""

    KIND = "yes_no"

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> pd.DataFrame:
        """As the base class, whose file of per-sample scores then gets its indices back: it read them as numbers."""
        eval_file = str(answers.pickled(Path(eval_file)))
        table = super().evaluate(eval_file, **judge_kwargs)
        path = get_intermediate_file_path(eval_file, "_auxmatch")
        scored = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        scored["index"] = list(answers.read(Path(eval_file))["index"])
        dump(scored, path)
        return table


class ShippedShortAnswer(_Shipped, ImageVQADataset):
    """One-word answers: VLMEvalKit's case-insensitive exact match, which its own class ties to data set names.

    Several true answers are a list in brackets; any of them counts.
    """

    KIND = "short_answer"

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> pd.DataFrame:
        """Accuracy in percent, overall and per category."""
        data = answers.read(answers.pickled(Path(eval_file)))
        data["eval_score"] = [
            float(given.strip().lower() in _truths(truth))
            for given, truth in zip(data["prediction"], data["answer"], strict=True)
        ]
        dump(data, get_intermediate_file_path(eval_file, "_results", "csv"))
        totals: dict[Any, float] = {"Overall": 100 * data["eval_score"].mean()}
        if "category" in data:
            totals |= (100 * data.groupby("category")["eval_score"].mean()).to_dict()
        table = pd.DataFrame([totals])
        dump(table, get_intermediate_file_path(eval_file, "_acc", "csv"))
        return table


def _truths(cell: str) -> set[str]:
    """The true answers of a cell, folded: itself, or the members of a list in brackets."""
    try:
        parsed = ast.literal_eval(cell) if cell.startswith("[") else cell
    except (SyntaxError, ValueError):
        parsed = cell
    return {str(truth).strip().lower() for truth in (parsed if isinstance(parsed, list) else [cell])}


class ShippedList(_Shipped):
    """Answers that are lists with commas between the items, sent as they stand, scored by what is there in order."""

    TYPE = "LIST"
    KIND = "list"

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> pd.DataFrame:
        """Mean share of the list in order and whole lists, in percent; the former per category too."""
        data = answers.read(answers.pickled(Path(eval_file)))
        pairs = list(zip(data["prediction"], data["answer"], strict=True))
        data["in_order"] = [in_order(given, truth) for given, truth in pairs]
        data["whole"] = [float(items(given) == items(truth)) for given, truth in pairs]
        dump(data, get_intermediate_file_path(eval_file, "_results", "csv"))
        totals: dict[Any, float] = {name: 100 * data[name].mean() for name in ("in_order", "whole")}
        if "category" in data:
            totals |= (100 * data.groupby("category")["in_order"].mean()).to_dict()
        table = pd.DataFrame([totals])
        dump(table, get_intermediate_file_path(eval_file, "_acc", "csv"))
        return table


class Grounding(_Shipped):
    """Referring expressions: the model's adapter returns canonical boxes, nothing is guessed.

    A prediction is ``[x1, y1, x2, y2]`` as fractions of the original image, or any other text, which is one miss.
    """

    TYPE = "GROUNDING"
    KIND = "grounding"

    def load_data(self, dataset: str) -> pd.DataFrame:
        """As the base class; the expressions lose the outer spaces that many annotations have."""
        table = super().load_data(dataset)
        table["question"] = table["question"].str.strip()
        return table

    def build_prompt(self, line: Any) -> list[dict[str, str]]:
        """For models without a grounding prompt of their own."""
        message = super().build_prompt(line)
        message[-1]["value"] = (
            f"Give the bounding box of {message[-1]['value']} as [x1, y1, x2, y2], "
            "in fractions of the image's width and height."
        )
        return message

    def evaluate(self, eval_file: str, **judge_kwargs: Any) -> dict[str, Any]:
        """Acc@0.5/0.75/0.9, mean IoU, per object size, and how many answers held no box."""
        data = answers.read(answers.pickled(Path(eval_file)))
        for frame, side in (("answer_width", "width"), ("answer_height", "height")):
            if frame not in data:
                data[frame] = data[side]
        rows = data.to_dict("records")
        scored = score(
            [(ground_truth({str(k): v for k, v in row.items()}), row["prediction"]) for row in rows], FORMATS["unit"]
        )
        per_sample = pd.DataFrame(scored.rows())
        dump(per_sample, get_intermediate_file_path(eval_file, "_results", "csv"))
        summary = scored.summary()
        flat = {key: value for key, value in summary.items() if not isinstance(value, dict)}
        dump(pd.DataFrame([flat]), get_intermediate_file_path(eval_file, "_acc", "csv"))
        return summary


CLASSES: tuple[type[ImageBaseDataset], ...] = (Grounding, ShippedList, ShippedMCQ, ShippedYesNo, ShippedShortAnswer)


def of_file(benchmark: benchmarks.Benchmark, path: Path) -> Any:
    """The data set of a declared benchmark of a kind of ours, with the rows of another file, e.g. its validation split.

    Raises: as `read_tsv`.
    """
    cls = next(cls for cls in CLASSES if getattr(cls, "KIND", "") == benchmark.kind)
    return type(cls.__name__, (cls,), {"FILE": path, "adds_videos": True, "frames": benchmark.frames})(
        dataset=benchmark.vlmeval
    )


def message_key(message: list[dict[str, Any]]) -> str:
    """Content hash of a prompt: its texts and the bytes of its images and videos, in order."""
    digest = hashlib.sha256()
    for part in message:
        digest.update(json.dumps([part["type"], videos.content(part)]).encode())
    return digest.hexdigest()


def image_key(message: list[dict[str, Any]]) -> str:
    """Content hash of what a prompt shows, equal for all questions on the same pictures; 16 hexadecimal digits."""
    content = [videos.content(part) for part in message if part["type"] != "text"]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
