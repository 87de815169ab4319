"""easy-VQA's test as a benchmark file: ``ivcp lab easy-vqa FOLDER --out easy_vqa.tsv``.

easy-VQA (Victor Zhou, MIT licence) comes as the package ``easy-vqa``; FOLDER is its ``data/test``, with
``questions.json`` and ``images/``. Its pictures of 64 x 64 pixels hold one shape each. No embedded model is trained on
it, and some of its words (teal, brown, rectangle) are not theirs.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from ivcp_eval.files import atomic_write

COLUMNS = ("index", "image", "question", "answer", "category", "image_id")
SHAPES = ("circle", "rectangle", "triangle")


def rows(folder: Path) -> Iterator[dict[str, str | int]]:
    """One row per question; a picture stands in the row of its first question, as VLMEvalKit reads it.

    Raises:
        ValueError: ``questions.json`` is not a list of [question, answer, number of the picture].
    """
    source = folder / "questions.json"
    first: dict[int, int] = {}
    for index, entry in enumerate(json.loads(source.read_text(encoding="utf-8")), start=1):
        match entry:
            case [str(question), str(answer), int(picture)]:
                shown = first.setdefault(picture, index)
                data = (folder / "images" / f"{picture}.png").read_bytes() if shown == index else b""
                yield {
                    "index": index,
                    "image": base64.b64encode(data).decode() or shown,
                    "question": question,
                    "answer": answer,
                    "category": "yes_no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour",
                    "image_id": picture,
                }
            case _:
                raise ValueError(f"{source}: entry {index} is {entry!r}, not [question, answer, picture]")


def main(arguments: list[str] | None = None) -> int:
    """Command line: write the file."""
    parser = argparse.ArgumentParser(prog="ivcp lab easy-vqa", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="`data/test` of the package easy-vqa")
    parser.add_argument("--out", type=Path, required=True, help="TSV file to write")
    args = parser.parse_args(arguments)
    if not (args.folder / "questions.json").is_file():
        parser.error(f"{args.folder} holds no questions.json; name the folder data/test of the package easy-vqa")
    with atomic_write(args.out, "w") as handle:
        writer = csv.DictWriter(handle, fieldnames=COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(args.folder))
    return 0
