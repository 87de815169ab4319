"""Write the second embedded model's benchmarks: ``ivcp lab build-benchmarks tiny2 --out DIR [--split validation]``.

The files hold the first questions of the streams that the acceptance asks (`evaluate.questions`), in the format of
``datasets/tiny_*.tsv``. Settings are chosen on the validation split.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
from pathlib import Path

import numpy as np

from ivcp_eval.files import atomic_write
from ivcp_eval.lab.tiny.build_benchmarks import encode_png
from ivcp_eval.lab.tiny2.evaluate import questions
from ivcp_eval.runs.planning.numbers import COUNT

COLUMNS = ("index", "image", "question", "answer", "width", "height", "category", "image_id")
TASKS = ("grounding", "short")


def build(task: str, split: str, count: int) -> bytes:
    """Content of the file with the first ``count`` questions of ``task`` (``grounding`` or ``short``)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    first: dict[str, int] = {}
    for index, question in enumerate(questions(split, count, task), start=1):
        (image,), sample = question.images, question.sample
        shown = first.setdefault(question.cluster, index)
        writer.writerow(
            {
                "index": index,
                "image": base64.b64encode(encode_png(np.asarray(image))).decode() if shown == index else shown,
                "question": sample.question,
                "answer": str(list(sample.box)) if sample.box else sample.answer,
                "width": image.width,
                "height": image.height,
                "category": sample.category,
                "image_id": question.cluster,
            }
        )
    return text.getvalue().encode()


def main(arguments: list[str] | None = None) -> int:
    """Command line: write ``tiny2_grounding.tsv`` and ``tiny2_short.tsv``."""
    parser = argparse.ArgumentParser(prog="ivcp lab build-benchmarks tiny2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the TSV files")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--questions", type=COUNT, default=300, help="per file (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        with atomic_write(args.out / f"tiny2_{task}.tsv", "wb") as handle:
            handle.write(build(task, args.split, args.questions))
    return 0
