"""Write the embedded benchmarks ``datasets/tiny_*.tsv``: ``ivcp lab build-benchmarks [--check]``.

The files follow VLMEvalKit's TSV conventions: one row per question, the picture as base64 PNG in the ``image``
cell of its first question, and that row's index in the ``image`` cell of the others. They hold scenes of the
``test`` split; ``--split validation --out DIR`` writes sets of the same kind for choosing settings.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ivcp_eval.files import DATASETS
from ivcp_eval.lab.tiny import tasks
from ivcp_eval.lab.tiny.scenes import Scene, render, sample_scene, scene_rng

CHECKSUMS = "tiny_checksums.json"
#: Scenes of one benchmark start at its number times this, so that no picture is in two files.
SCENES_APART = 1_000_000
QUESTIONS_PER_IMAGE = 2

Row = dict[str, str | int]


@dataclass(frozen=True)
class Benchmark:
    """One file: its columns, its quota of questions per category, and how to ask one."""

    number: int
    columns: tuple[str, ...]
    quotas: dict[str, int]
    ask: Callable[[np.random.Generator, Scene, str], tasks.Sample | None]


def _ask_box(rng: np.random.Generator, scene: Scene, category: str) -> tasks.Sample | None:
    references = (tasks.plain_references if category == "plain" else tasks.relation_references)(scene)
    return references[rng.integers(len(references))] if references else None


def _ask_yes_no(rng: np.random.Generator, scene: Scene, category: str) -> tasks.Sample | None:
    question = tasks.yes_no_question(rng, scene)
    return question if question and question.category == category else None


BENCHMARKS = {
    "tiny_grounding.tsv": Benchmark(
        0,
        ("index", "image", "question", "answer", "width", "height", "category", "image_id"),
        {"plain": 200, "relation": 100},
        _ask_box,
    ),
    "tiny_mcq.tsv": Benchmark(
        1,
        ("index", "image", "question", "A", "B", "C", "D", "answer", "category", "image_id"),
        dict.fromkeys(tasks.MCQ_CATEGORIES, 60),
        tasks.mcq_question,
    ),
    "tiny_yes_no.tsv": Benchmark(
        2,
        ("index", "image", "question", "answer", "category", "image_id"),
        {"present": 150, "adversarial": 75, "random": 75},
        _ask_yes_no,
    ),
    "tiny_short.tsv": Benchmark(
        3,
        ("index", "image", "question", "answer", "category", "image_id"),
        dict.fromkeys(tasks.SHORT_CATEGORIES, 80),
        tasks.short_question,
    ),
}


def _ask_list(rng: np.random.Generator, scene: Scene, category: str) -> tasks.Sample | None:
    del rng
    return (tasks.list_question if category == "order" else tasks.sum_question)(scene)


#: Long answers, which the embedded model was not taught: not among what it is evaluated on by default.
UNTAUGHT = {
    "tiny_list.tsv": Benchmark(
        4,
        ("index", "image", "question", "answer", "category", "image_id"),
        {"order": 120, "sum": 120},
        _ask_list,
    ),
}


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Return an 8-bit palette PNG of ``image`` (height, width, 3).

    Written out here because the bytes must not depend on the version of an imaging library, whose bundled
    compressors differ; the standard library's zlib is stable.

    Raises:
        ValueError: if the picture has more than 256 colours.
    """
    height, width, _ = image.shape
    packed = image.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    palette, indices = np.unique(packed, return_inverse=True)
    if len(palette) > 256:
        raise ValueError(f"{len(palette)} colours in the picture; a palette PNG holds at most 256")
    rows = np.zeros((height, width + 1), dtype=np.uint8)
    rows[:, 1:] = indices.reshape(height, width)
    entries = palette.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", entries),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def benchmark_rows(name: str, split: str) -> Iterator[Row]:
    """Yield the rows of benchmark ``name`` for ``split``, a few questions per scene until every quota is full."""
    benchmark = (BENCHMARKS | UNTAUGHT)[name]
    left = dict(benchmark.quotas)
    index, number = 1, benchmark.number * SCENES_APART
    while any(left.values()):
        rng = scene_rng(split, number)
        scene = sample_scene(rng)
        samples: list[tasks.Sample] = []
        # The rarest category first: most scenes can serve the common ones.
        for category in sorted(left, key=lambda c: (-left[c] / benchmark.quotas[c], c)):
            sample = benchmark.ask(rng, scene, category) if left[category] else None
            if sample and len(samples) < QUESTIONS_PER_IMAGE:
                samples.append(sample)
                left[category] -= 1
        first = index
        for sample in samples:
            image = base64.b64encode(encode_png(render(scene))).decode() if index == first else str(first)
            yield _row(benchmark, index, image, sample, scene, f"{split}_{number}")
            index += 1
        number += 1


def _row(benchmark: Benchmark, index: int, image: str, sample: tasks.Sample, scene: Scene, image_id: str) -> Row:
    row: Row = {
        "index": index,
        "image": image,
        "question": sample.question,
        "answer": str(list(sample.box)) if sample.box else sample.answer,
        "width": scene.width,
        "height": scene.height,
        "category": sample.category,
        "image_id": image_id,
        **dict(zip(tasks.LETTERS, sample.options, strict=False)),
    }
    return {column: row[column] for column in benchmark.columns}


@lru_cache(maxsize=16)
def content(name: str, split: str = "test") -> bytes:
    """Return the content of one benchmark file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=(BENCHMARKS | UNTAUGHT)[name].columns, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(benchmark_rows(name, split))
    return text.getvalue().encode()


def build(split: str = "test") -> dict[str, bytes]:
    """Return the content of every benchmark file."""
    return {name: content(name, split) for name in BENCHMARKS | UNTAUGHT}


def checksums(files: dict[str, bytes]) -> bytes:
    """Return the content of the checksum list: SHA-256 and number of questions of each file."""
    table = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "rows": data.count(b"\n") - 1}
        for name, data in sorted(files.items())
    }
    return (json.dumps(table, indent=2) + "\n").encode()


def main(argv: list[str] | None = None) -> int:
    """Command line: write the files, or compare them with what would be written."""
    parser = argparse.ArgumentParser(
        prog="ivcp lab build-benchmarks tiny", description="Write (or check) the embedded benchmarks."
    )
    parser.add_argument("--out", type=Path, default=DATASETS, help="folder of the TSV files")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    arguments = parser.parse_args(argv)
    files = dict(build(arguments.split))
    files[CHECKSUMS] = checksums(files)
    if arguments.check:
        differing = [n for n, data in files.items() if _read(arguments.out / n) != data]
        if differing:
            sys.stderr.write(
                f"differ from what the generator writes: {', '.join(differing)} in {arguments.out}; "
                "run without --check to write them again\n"
            )
        return 1 if differing else 0
    from ivcp_eval.files import atomic_write

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with atomic_write(arguments.out / name, "wb") as handle:
            handle.write(data)
    return 0


def one_file(
    prog: str, about: str, name: str, content: Callable[[str], bytes], arguments: list[str] | None = None
) -> int:
    """Command line of a generator of one file: write ``content(split)`` as ``name``, or compare with what is there."""
    parser = argparse.ArgumentParser(prog=prog, description=about.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATASETS, help="folder of the TSV file")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file differs")
    args = parser.parse_args(arguments)
    path, made = args.out / name, content(args.split)
    if args.check:
        same = _read(path) == made
        if not same:
            sys.stderr.write(f"{path} differs from what the generator writes; run without --check to write it again\n")
        return int(not same)
    from ivcp_eval.files import atomic_write

    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as handle:
        handle.write(made)
    return 0


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
