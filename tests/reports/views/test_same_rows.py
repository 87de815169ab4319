"""One comparison: curves and the sensitivity page say what `compare` says, also where a metric is no mean of scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcp_eval import benchmarks
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.provenance import Reference
from ivcp_eval.reports.table import make_row, write_results, write_samples
from ivcp_eval.reports.views import sensitivity
from ivcp_eval.reports.views.curves import curve_rows

Samples = list[dict[str, Any]]
USUAL = {"layer": 2, "heads": "mean"}


def right(share: float, n: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def mme(share: float, seed: int) -> tuple[Samples, float]:
    """Ten images with two questions in each of three categories; accuracy + both right, in percent, summed."""
    scores = right(share, 60, seed).reshape(3, 10, 2)
    samples = [
        {"index": f"{c}-{i}-{q}", "cluster": f"{c}-{i}", "category": name, "score": scores[c, i, q]}
        for c, name in enumerate(("OCR", "color", "code_reasoning"))
        for i in range(10)
        for q in range(2)
    ]
    return samples, float(sum(100 * (part.mean() + part.all(axis=1).mean()) for part in scores))


def pope(share: float, seed: int) -> tuple[Samples, float]:
    """F1 of "yes" over questions of which each counts in one category."""
    truth, hit = right(0.5, 80, 99), right(share, 80, seed)
    said = np.where(hit == 1, truth, 1 - truth)
    samples = [
        {
            "index": str(i),
            "cluster": f"image {i // 4}",
            "category": "random",
            "prediction": "yes" if said[i] else "no",
            "answer": "yes" if truth[i] else "no",
            "score": hit[i],
        }
        for i in range(80)
    ]
    precision, recall = (said * truth).sum() / said.sum(), (said * truth).sum() / truth.sum()
    return samples, float(100 * 2 * precision * recall / (precision + recall))


def mmbench(share: float, seed: int) -> tuple[Samples, float]:
    """A question is right if all four rotations are."""
    scores = right(share, 160, seed).reshape(40, 4)
    samples = [
        {"index": str(q + 1_000_000 * r), "cluster": str(q + 1_000_000 * r), "score": scores[q, r]}
        for q in range(40)
        for r in range(4)
    ]
    return samples, float(100 * scores.all(axis=1).mean())


def cv_bench(share: float, seed: int) -> tuple[Samples, float]:
    """The mean over sources of unequal size."""
    scores = right(share, 70, seed)
    names = np.array(["ADE20K"] * 50 + ["COCO"] * 20)
    samples = [{"index": str(i), "category": names[i], "score": scores[i]} for i in range(70)]
    return samples, float(100 * np.mean([scores[names == name].mean() for name in ("ADE20K", "COCO")]))


BENCHMARKS: dict[str, tuple[float, Callable[[float, int], tuple[Samples, float]]]] = {
    "MME": (2800, mme),
    "POPE": (100, pope),
    "MMBench_DEV_EN_V11": (100, mmbench),
    "MMBench_DEV_CN_V11": (100, mmbench),
    "CV-Bench-2D": (100, cv_bench),
}


def write(folder: Path, benchmark: str) -> Path:
    """Unpruned, a method at two settings, and three seeds of random; the scores are the benchmark's own."""
    entries = [("none", {}, 0, 0.95), ("fastv", USUAL, 0, 0.8), ("fastv", {**USUAL, "layer": 3}, 0, 0.7)]
    entries += [("random", {}, seed, 0.6) for seed in range(3)]
    scale, draw = BENCHMARKS[benchmark]
    metric = benchmarks.load(benchmark).metrics[0].name
    rows = []
    for number, (method, parameters, seed, share) in enumerate(entries):
        samples, score = draw(share, number)
        write_samples(folder / f"{number}.csv", samples)
        rows.append(
            make_row(
                **{"model": "tiny", "method": method, "method_parameters": parameters, "seed": seed, "status": "ok"},
                **{"benchmark": benchmark, "metric": metric, "score": score, "score_scale": scale},
                ratio_asked=1.0 if method == "none" else 0.5,
                run_id=str(number),
                predictions=f"{number}.csv",
            )
        )
    write_results(folder / "sweep.csv", rows)
    return folder / "sweep.csv"


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_all_three_say_the_same(tmp_path: Path, benchmark: str) -> None:
    path, draw = write(tmp_path, benchmark), BENCHMARKS[benchmark][1]
    compared = compare(path).rows
    assert all(row.paired for row in compared)
    stated = [draw(share, n)[1] for n, share in enumerate((0.95, 0.8, 0.7, 0.6, 0.6, 0.6))]
    assert [row.difference for row in compared] == pytest.approx(
        [stated[1] - stated[0], stated[2] - stated[0], np.mean(stated[3:]) - stated[0]]
    )
    drawn = curve_rows(path)
    for name in ("difference", "difference_low", "difference_high"):
        assert [row[name] for row in drawn] == [getattr(row, name) for row in compared], name
    against_random = {row.method_parameters: row for row in compare(path, against="random").rows}
    for point in drawn[:2]:
        other = against_random[point["method_parameters"]]
        assert (point["over_random"], point["over_random_low"]) == (other.difference, other.difference_low)
        assert point["over_random"] == pytest.approx(point["score"] - np.mean(stated[3:]))
    against_usual = compare(path, against=Reference("fastv", USUAL)).rows
    page = [line[f"{benchmark} 0.5"] for rows in sensitivity.tables(path).values() for line in rows]
    assert page[0] == f"{stated[1]:.1f}"
    for cell, row, score in zip(page[1:], against_usual, (stated[2], np.mean(stated[3:])), strict=True):
        assert row.difference == pytest.approx(score - stated[1])
        assert cell.startswith(f"{row.difference:+.1f} ({row.difference_low:+.1f} to {row.difference_high:+.1f})")


def test_seeds_of_a_sum_are_averaged_after_summing(tmp_path: Path) -> None:
    """MME of the mean answer is not the mean of MME: both questions of an image must be right in one seed."""
    row = compare(write(tmp_path, "MME")).rows[2]
    scores = [mme(0.6, number)[1] for number in (3, 4, 5)]
    assert (row.n_seeds, row.seed) == (3, None)
    assert row.score_pruned == pytest.approx(np.mean(scores))
    assert (row.score_lowest_seed, row.score_highest_seed) == (min(scores), max(scores))
    assert row.difference_low < row.difference < row.difference_high < 0
    assert "3: " in compare(write(tmp_path, "MME")).to_terminal()
