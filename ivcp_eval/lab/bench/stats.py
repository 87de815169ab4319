"""How long a comparison takes, from the CSV files to the table: made-up scores of many variants on many samples.

``ivcp bench stats --variants 100 --samples 50000``. How to read the lines: docs/bench.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ivcp_eval.lab.bench.report import Report, environment
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.table import make_row, write_results, write_samples
from ivcp_eval.runs.planning.numbers import COUNT

#: Of a comparison, from the files to the rows, on the clock.
TARGET_S = 60.0
_COLUMNS = ("scores", "variants", "samples", "resamples", "cpu_s", "elapsed_s", "peak_mb", "target_s", "met", "load")
_SHOWN = {
    "scores": ("scores", "{}"),
    "variants": ("variants", "{}"),
    "samples": ("samples", "{}"),
    "resamples": ("resamples", "{}"),
    "CPU s": ("cpu_s", "{:.1f}"),
    "elapsed s": ("elapsed_s", "{:.1f}"),
    "target": ("target_s", "<= {:.0f}"),
    "met": ("met", "{}"),
    "peak MB": ("peak_mb", "{:.0f}"),
    "load": ("load", "{:.1f}"),
}
#: Files that are written; further variants are links to them, which are read like files of their own.
FILES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each kind of scores takes."""
    parser = argparse.ArgumentParser(prog="ivcp bench stats", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--variants", type=COUNT, default=100, help="(default: %(default)s)")
    parser.add_argument("--samples", type=COUNT, default=50_000, help="of each variant (default: %(default)s)")
    parser.add_argument("--resamples", type=COUNT, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write OUT.csv and OUT.json, and what it was measured on")
    parser.add_argument("--check", action="store_true", help=f"exit 1 if one takes longer than {TARGET_S:.0f} s")
    args = parser.parse_args(arguments)
    command = shlex.join(["ivcp", "bench", "stats", *(sys.argv[1:] if arguments is None else arguments)])
    report = Report(args.out, environment("cpu", command), sys.stdout, _COLUMNS, _SHOWN)
    for graded in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            results = written(Path(folder), args.variants, args.samples, graded)
            wall, start = time.perf_counter(), time.process_time()
            compare(results, resamples=args.resamples, margin=1)
            taken = time.process_time() - start, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        kind = "any score in 0..1, a cluster each" if graded else "right or wrong, two samples a cluster"
        row = {"scores": kind, "variants": args.variants, "samples": args.samples, "resamples": args.resamples}
        row |= {"cpu_s": taken[0], "elapsed_s": taken[1], "peak_mb": peak, "target_s": TARGET_S}
        report.add([row | {"met": taken[1] <= TARGET_S, "load": os.getloadavg()[0]}])
    report.finish(environment("cpu", command))
    return int(args.check and report.missed)


def written(folder: Path, variants: int, samples: int, graded: bool) -> Path:
    """A results CSV of a baseline and so many variants, with its per-sample files."""
    generator = np.random.default_rng(0)
    before = generator.random(samples) if graded else (generator.random(samples) < 0.7).astype(float)
    scores = {"none": before}
    for number in range(min(FILES, variants)):
        drawn = before + generator.normal(0, 0.1, samples) if graded else (generator.random(samples) < 0.5)
        scores[str(number)] = np.where(generator.random(samples) < 0.2, np.clip(drawn, 0, 1), before)
    for name, values in scores.items():
        write_samples(folder / f"file_{name}.csv", _rows(values, graded))
    rows = []
    for number in range(-1, variants):
        name = "none" if number < 0 else str(number % FILES)
        (folder / f"{number}.csv").symlink_to(folder / f"file_{name}.csv")
        rows.append(
            make_row(
                model="made_up",
                benchmark="made_up",
                metric="score",
                method="none" if number < 0 else "random",
                ratio_asked=1 if number < 0 else (number + 1) / (variants + 1),
                score=100 * float(np.mean(scores[name])),
                score_scale=100,
                n_samples=samples,
                status="ok",
                run_id=str(number),
                predictions=f"{number}.csv",
            )
        )
    write_results(folder / "results.csv", rows)
    return folder / "results.csv"


def _rows(values: np.ndarray, graded: bool) -> list[dict[str, object]]:
    return [
        {"index": i, "cluster": i if graded else f"picture {i // 2}", "prediction": f"{value:.2f}", "score": value}
        | {"answer": "yes", "prompt_sha256": f"{i:064x}", "visual_tokens": 576, "visual_kept": 288, "new_tokens": 3}
        for i, value in enumerate(values)
    ]
