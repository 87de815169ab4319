"""How long a comparison takes, from the CSV files to the table: made-up scores of many variants on many samples.

``ivcp bench stats --variants 100 --samples 50000``. How to read the lines: docs/bench.md.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.table import make_row, write_results, write_samples
from ivcp_eval.runs.planning.numbers import COUNT

#: Files that are written; further variants are links to them, which are read like files of their own.
FILES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each kind of scores takes."""
    parser = argparse.ArgumentParser(prog="ivcp bench stats", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--variants", type=COUNT, default=100, help="(default: %(default)s)")
    parser.add_argument("--samples", type=COUNT, default=50_000, help="of each variant (default: %(default)s)")
    parser.add_argument("--resamples", type=COUNT, default=10_000, help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    what = f"{args.variants} variants, {args.samples} samples, {args.resamples} resamples"
    sys.stdout.write(f"{what}; processor time\n")
    for graded in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            results = written(Path(folder), args.variants, args.samples, graded)
            wall, start = time.perf_counter(), time.process_time()
            compare(results, resamples=args.resamples, margin=1)
            taken = time.process_time() - start, time.perf_counter() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        kind = "any score in 0..1, a cluster each" if graded else "right or wrong, two samples a cluster"
        sys.stdout.write(f"{kind}: {taken[0]:.1f} s ({taken[1]:.1f} s on the clock), peak memory {peak:.0f} MB\n")
        sys.stdout.flush()
    return 0


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
