"""Curves: the difference to random is found where it is and denied where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ivcp_eval.curves import curve_rows, main
from ivcp_eval.results import make_row, write_results, write_samples

N = 120


def _sweep(folder: Path, scores: dict[tuple[str, int], np.ndarray], with_baseline: bool = True) -> Path:
    rows = []
    for (method, seed), values in scores.items():
        if method == "none" and not with_baseline:
            continue
        name = f"{method}-{seed}"
        samples = [{"index": str(i), "cluster": f"image {i // 2}", "score": float(v)} for i, v in enumerate(values)]
        write_samples(folder / f"{name}.csv", samples)
        rows.append(
            make_row(
                model="tiny",
                method=method,
                seed=seed,
                benchmark="tiny_mcq",
                metric="accuracy",
                status="ok",
                ratio_asked=1.0 if method == "none" else 0.5,
                score=100 * values.mean(),
                score_scale=100,
                run_id=name,
                predictions=f"{name}.csv",
                n_samples=N,
                n_clusters=N // 2,
            )
        )
    write_results(folder / "sweep.csv", rows)
    return folder / "sweep.csv"


def _scores() -> dict[tuple[str, int], np.ndarray]:
    draw = np.random.default_rng(0)
    full = (draw.random(N) < 0.9).astype(float)
    made = {("none", 0): full, ("fastv", 0): full.copy()}
    for seed in (0, 1):
        made["random", seed] = np.where(draw.random(N) < 0.5, full, 0.0)
    made["uniform", 0] = np.where(draw.random(N) < 0.5, full, 0.0)
    made["divprune", 0] = np.zeros(N)
    return made


def test_verdicts_against_random(tmp_path: Path) -> None:
    rows = {(row["method"]): row for row in curve_rows(_sweep(tmp_path, _scores()), resamples=500)}
    assert rows["fastv"]["verdict"] == "better than random"
    assert rows["fastv"]["difference"] == 0
    assert rows["uniform"]["verdict"] == "not distinguishable from random"
    assert rows["divprune"]["verdict"] == "worse than random"
    assert rows["random"]["verdict"] == ""
    both = [scores.mean() * 100 for (method, _), scores in _scores().items() if method == "random"]
    assert rows["fastv"]["random"] == pytest.approx(np.mean(both))


def test_files_are_written_beside_the_results(tmp_path: Path) -> None:
    path = _sweep(tmp_path, _scores())
    assert main([str(path), "--resamples", "200"]) == 0
    assert (tmp_path / "sweep.curves.csv").read_text().count("\n") == 1 + 5
    assert (tmp_path / "sweep.curves.png").read_bytes()[:4] == b"\x89PNG"


def test_without_an_unpruned_row_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished unpruned row"):
        curve_rows(_sweep(tmp_path, _scores(), with_baseline=False))
