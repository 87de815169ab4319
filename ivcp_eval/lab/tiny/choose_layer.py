"""Chooses the cut layer of IVC-Prune for the shipped model, on the validation split only.

``ivcp lab choose-layer --out results/tiny_cut_layer.csv``: accuracy of every layer on
validation scenes, all layers of a sample in one pass. The held-out benchmarks are never read.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ivcp_eval.files import atomic_write
from ivcp_eval.interface import models
from ivcp_eval.interface.variants import Variant
from ivcp_eval.lab.tiny import tasks
from ivcp_eval.lab.tiny.build_benchmarks import build
from ivcp_eval.lab.tiny.evaluate import Question, is_right, read_benchmark
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.numbers import COUNT
from ivcp_eval.runs.planning.placement import Limits, Placement

RATIOS = (0.5, 0.25)
TASKS = ("tiny_grounding.tsv", "tiny_short.tsv")


def questions(per_task: int) -> list[Question]:
    """The first questions of each task of the validation split, built in a temporary folder."""
    chosen = []
    with tempfile.TemporaryDirectory() as folder:
        for name, content in build("validation").items():
            if name in TASKS:
                path = Path(folder, name)
                path.write_bytes(content)
                rows = read_benchmark(path)
                chosen += rows[:: max(1, len(rows) // per_task)][:per_task]
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Measure every layer and write the table."""
    parser = argparse.ArgumentParser(prog="ivcp lab choose-layer", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--per-task", type=COUNT, default=120, help="questions of each task (default: %(default)s)")
    args = parser.parse_args(arguments)
    weights = models.locate("tiny")
    session = Session(weights, Placement("cpu").resolve(), Limits.published(weights))
    layers = range(1, len(session.adapter.text_model(session.model).layers))
    variants = [Variant("tiny")]
    variants += [Variant("tiny", "ivc_prune", ratio, {"layer": k}) for ratio in RATIOS for k in layers]
    hits: dict[tuple[str, int], list[bool]] = defaultdict(list)
    chosen = questions(args.per_task)
    for question in tqdm(chosen):
        parts: list[Mapping[str, Any]] = [{"image": question.image}, {"text": tasks.build_prompt(question.sample)}]
        for i, answer in enumerate(session.answer_all(parts, variants)):
            hits[question.sample.task, i].append(is_right(question.sample, answer.prediction))
    with atomic_write(args.out) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("task", "method", "layer", "ratio", "accuracy_percent", "n"))
        for (task, i), right in sorted(hits.items()):
            variant = variants[i]
            row = (task, variant.method, variant.parameters.get("layer", ""), variant.ratio)
            writer.writerow((*row, round(100 * sum(right) / len(right), 2), len(right)))
    return 0
