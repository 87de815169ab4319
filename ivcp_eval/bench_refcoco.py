"""Benchmark of the RefCOCO converter against two straightforward ones, on generated data.

    python -m ivcp_eval.bench_refcoco --images 1500 --expressions 10000

The two references are what one writes first: for every *expression* open the picture, compress it again and write it
through ``csv.writer`` (``re-encode``), or read and base64 the file as the released IVC-Prune converter does
(``copy``). Each converter runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivcp_eval.benchmarks.refcoco.images import available_cores

__all__ = ["Measurement", "convert_by_copying", "convert_by_reencoding", "convert_with_package", "main", "make_corpus"]

_QUALITY = 90


def make_corpus(folder: Path, images: int, expressions: int, seed: int = 0) -> Path:
    """Write ``images`` JPEG pictures of 640x480 pixels and one MDETR file with ``expressions`` entries; its path.

    Pictures are smooth colours plus noise: about 170 kB each, as in COCO train2014.
    """
    import numpy as np
    from PIL import Image

    rng, chance = np.random.default_rng(seed), random.Random(seed)
    pictures = folder / "train2014"
    pictures.mkdir(parents=True)
    for number in range(images):
        smooth = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
        noisy = np.asarray(smooth, dtype=np.float32) + rng.normal(0, 12, (480, 640, 1)).astype(np.float32)
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(pictures / f"COCO_train2014_{number:012d}.jpg", quality=_QUALITY)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(expressions):
        name = f"COCO_train2014_{index * images // expressions:012d}.jpg"
        entry = {"id": index, "file_name": name, "width": 640, "height": 480, "dataset_name": "refcoco"}
        entries.append(entry | {"caption": f"the {chance.choice(['left', 'red', 'tall'])} thing, number {index}"})
        x, y = chance.uniform(0, 400), chance.uniform(0, 300)
        box = [round(x, 2), round(y, 2), round(chance.uniform(20, 200), 2), round(chance.uniform(20, 150), 2)]
        annotations.append({"id": index, "image_id": index, "bbox": box, "original_id": 10**6 + index})
    path = folder / "finetune_refcoco_val.json"
    path.write_text(json.dumps({"images": entries, "annotations": annotations}), encoding="utf-8")
    return path


def _reference(annotations: Path, target: Path, encode: Callable[[Path], bytes]) -> None:
    content = json.loads(annotations.read_text(encoding="utf-8"))
    boxes = {annotation["image_id"]: annotation["bbox"] for annotation in content["annotations"]}
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(["index", "image", "question", "height", "width", "answer"])
        for entry in content["images"]:
            image = base64.b64encode(encode(annotations.parent / "train2014" / entry["file_name"])).decode()
            x, y, w, h = boxes[entry["id"]]
            answer = json.dumps([x, y, x + w, y + h])
            writer.writerow([entry["id"], image, entry["caption"], entry["height"], entry["width"], answer])


def _reencode(path: Path) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def convert_by_reencoding(annotations: Path, output: Path, workers: int) -> Path:
    """For every expression: decode the picture, compress it again, base64. ``workers`` is not used."""
    _reference(annotations, output / "reencode.tsv", _reencode)
    return output / "reencode.tsv"


def convert_by_copying(annotations: Path, output: Path, workers: int) -> Path:
    """For every expression: read the file, base64. ``workers`` is not used."""
    _reference(annotations, output / "copy.tsv", Path.read_bytes)
    return output / "copy.tsv"


def convert_with_package(annotations: Path, output: Path, workers: int) -> Path:
    """:func:`ivcp_eval.benchmarks.refcoco.convert.convert_mdetr`, which also checks every picture."""
    from ivcp_eval.benchmarks.refcoco.convert import convert_mdetr
    from ivcp_eval.benchmarks.refcoco.writer import Options

    convert_mdetr(annotations, annotations.parent / "train2014", output, Options(allow_partial=True, workers=workers))
    return output / "RefCOCO_val.tsv"


@dataclass(frozen=True)
class Measurement:
    """Wall time in seconds, size of the output in bytes, peak resident memory in MiB (process, its biggest child)."""

    seconds: float
    size: int
    memory: float
    child_memory: float


def _measure(
    converter: Callable[[Path, Path, int], Path], annotations: Path, output: Path, workers: int
) -> Measurement:
    start = time.perf_counter()
    target = converter(annotations, output, workers)
    seconds = time.perf_counter() - start
    memory, child_memory = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return Measurement(seconds, target.stat().st_size, memory, child_memory)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print the table; status 1 if the converter is not 3x faster and 2.5x smaller."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--expressions", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        annotations = make_corpus(folder, args.images, args.expressions)
        runs = (
            ("re-encode", convert_by_reencoding, 1),
            ("copy", convert_by_copying, 1),
            ("package, 1 process", convert_with_package, 1),
            (f"package, {args.workers} processes", convert_with_package, args.workers),
        )
        results: list[tuple[str, Measurement]] = []
        for label, converter, workers in runs:
            output = Path(tempfile.mkdtemp(dir=folder))
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                results.append((label, pool.submit(_measure, converter, annotations, output, workers).result()))
            for path in output.iterdir():
                path.unlink()  # gigabytes
    sys.stdout.write(_table(results))
    slow, ours = results[0][1], results[-1][1]
    return int(slow.seconds < 3 * ours.seconds or slow.size < 2.5 * ours.size)


def _table(results: Sequence[tuple[str, Measurement]]) -> str:
    ours = results[-1][1]
    lines = [f"{'converter':24}{'time':>9}{'ratio':>8}{'size':>11}{'ratio':>8}{'peak memory (largest child)':>31}"]
    for label, m in results:
        memory = f"{m.memory:.0f} MiB ({m.child_memory:.0f} MiB)"
        time_ratio, size_ratio = f"{m.seconds / ours.seconds:.1f}x", f"{m.size / ours.size:.1f}x"
        size = f"{m.size / 1e6:.0f} MB"
        lines.append(f"{label:24}{m.seconds:>7.1f} s{time_ratio:>8}{size:>11}{size_ratio:>8}{memory:>31}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
