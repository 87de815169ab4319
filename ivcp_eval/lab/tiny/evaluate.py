"""Held-out accuracies of a tiny model through stock ``generate``: ``ivcp lab evaluate``.

A plain check of the model itself, without VLMEvalKit and without pruning.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ivcp_eval.files import DATASETS
from ivcp_eval.lab.tiny import tasks
from ivcp_eval.lab.tiny.build_benchmarks import BENCHMARKS
from ivcp_eval.lab.tiny.training.validation import overlap, parse_box
from ivcp_eval.runs.planning.numbers import COUNT

SHIPPED_MODEL = Path(__file__).with_name("model")
#: Enough for the longest answer, a box of four three-digit numbers with its end token.
MAX_NEW_TOKENS = 20


@dataclass(frozen=True)
class Question:
    """One row of a benchmark with its decoded picture."""

    image: Image.Image
    sample: tasks.Sample


def read_benchmark(path: Path, limit: int | None = None) -> list[Question]:
    """Read the first ``limit`` rows of an embedded benchmark (all of them by default)."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))[:limit]
    return questions_of(rows, path.stem.removeprefix("tiny_"))


def questions_of(rows: Iterable[Mapping[str, str]], task: str) -> list[Question]:
    """The questions of a benchmark's first rows."""
    images: dict[str, Image.Image] = {}
    questions = []
    for row in rows:
        if len(row["image"]) >= 64:
            images[row["index"]] = Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")
            source = row["index"]
        else:
            source = row["image"]
        options = tuple(row[letter] for letter in tasks.LETTERS) if task == "mcq" else ()
        box = parse_box(row["answer"]) if task == "grounding" else None
        sample = tasks.Sample(task, row["category"], row["question"], row["answer"], options, box)
        questions.append(Question(images[source], sample))
    return questions


def answer(model: Any, processor: Any, questions: Iterable[Question]) -> list[str]:
    """Answer one batch of questions with greedy decoding."""
    import torch

    texts, images = [], []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": tasks.build_prompt(question.sample)}]
        message = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        images.append(question.image)
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)


def is_right(sample: tasks.Sample, text: str) -> bool:
    """Exact match, for grounding an IoU of at least 0.5."""
    if sample.task == "grounding":
        return overlap(parse_box(text), sample.box) >= 0.5
    return text.strip() == sample.answer


def evaluate(model: Any, processor: Any, questions: list[Question], batch_size: int) -> dict[str, float]:
    """Return accuracy in percent per category and overall, and questions per second."""
    hits: dict[str, list[bool]] = {}
    # Pictures of one size side by side, so that batches need little padding.
    ordered = sorted(questions, key=lambda q: q.image.size)
    began = time.perf_counter()
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        for question, text in zip(batch, answer(model, processor, batch), strict=True):
            right = is_right(question.sample, text)
            hits.setdefault(question.sample.category, []).append(right)
            hits.setdefault("overall", []).append(right)
    seconds = time.perf_counter() - began
    scores = {name: round(100 * sum(h) / len(h), 2) for name, h in sorted(hits.items())}
    return {**scores, "questions_per_second": round(len(ordered) / seconds, 1)}


def load(folder: Path) -> tuple[Any, Any]:
    """Load model (float32, on the CPU) and processor from ``folder``."""
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Command line: print the accuracies as JSON."""
    parser = argparse.ArgumentParser(
        prog="ivcp lab evaluate", description="Evaluate the tiny model on the embedded benchmarks."
    )
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--data", type=Path, default=DATASETS, help="folder of the TSV files")
    parser.add_argument("--batch-size", type=COUNT, default=32)
    parser.add_argument("--limit", type=COUNT, help="rows per benchmark")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    model, processor = load(arguments.model)
    report: dict[str, Any] = {"load_seconds": round(time.perf_counter() - began, 2)}
    for name in BENCHMARKS:
        questions = read_benchmark(arguments.data / name, arguments.limit)
        report[name] = evaluate(model, processor, questions, arguments.batch_size)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
