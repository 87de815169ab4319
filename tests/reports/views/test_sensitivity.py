"""Sensitivity: what was changed is named, differences are paired with the defaults, and only real ones are marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcp_eval.reports.table import make_row, read_results, write_results, write_samples
from ivcp_eval.reports.views.sensitivity import tables, varied, write

N = 120
FULL = (np.random.default_rng(0).random(N) < 0.7).astype(float)


def write_sweep(folder: Path, entries: list[tuple[str, dict[str, Any], int, np.ndarray]]) -> Path:
    """A results CSV with its per-sample files, these in another order for every entry."""
    rows = []
    for number, (method, parameters, seed, scores) in enumerate(entries):
        samples = [{"index": str(i), "cluster": f"image {i // 2}", "score": float(v)} for i, v in enumerate(scores)]
        write_samples(folder / f"{number}.csv", samples[number:] + samples[:number])
        rows.append(
            make_row(
                model="tiny",
                method=method,
                method_parameters=parameters,
                seed=seed,
                benchmark="tiny_mcq",
                metric="accuracy",
                status="ok",
                ratio_asked=1.0 if method == "none" else 0.5,
                score=100 * scores.mean(),
                score_scale=100,
                run_id=str(number),
                predictions=f"{number}.csv",
                n_samples=N,
                n_clusters=N // 2,
            )
        )
    write_results(folder / "sweep.csv", rows)
    return folder / "sweep.csv"


def entries() -> list[tuple[str, dict[str, Any], int, np.ndarray]]:
    """Layer 4 destroys every answer, "max" spoils one; random has two seeds."""
    one_lost = FULL.copy()
    one_lost[np.flatnonzero(FULL)[0]] = 0
    usual = {"layer": 2, "heads": "mean"}
    return [
        ("none", {}, 0, np.ones(N)),
        ("iwp", {**usual, "layer": 4}, 0, np.zeros(N)),
        ("iwp", usual, 0, FULL),
        ("iwp", {**usual, "heads": "max"}, 0, one_lost),
        ("iwp", {**usual, "layer": 1}, 0, FULL),
        ("random", {}, 0, FULL),
        ("random", {}, 1, np.zeros(N)),
    ]


def test_one_row_per_change(tmp_path: Path) -> None:
    (found,) = tables(write_sweep(tmp_path, entries()), resamples=500).values()
    rows = {row["changed"]: row["tiny_mcq 0.5"] for row in found}
    score = 100 * FULL.mean()
    assert list(rows) == ["iwp, defaults", "layer=4", "heads=max", "layer=1", "random"]
    assert rows["iwp, defaults"] == f"{score:.1f}"
    assert rows["layer=4"].startswith(f"{-score:+.1f} (")
    assert rows["layer=4"].endswith("*")
    assert rows["layer=1"].startswith("+0.0 (+0.0 to +0.0)")
    assert not rows["layer=1"].endswith("*")
    assert rows["heads=max"].startswith(f"{-100 / N:+.1f} (")
    assert not rows["heads=max"].endswith("*")
    assert rows["random"].startswith(f"{-score / 2:+.1f} ("), "seeds are averaged"


def test_models_and_limits_have_columns_of_their_own(tmp_path: Path) -> None:
    rows = read_results(write_sweep(tmp_path, entries()))
    other = [{**row, "model": "tiny2", "run_id": f"{row['run_id']}-2"} for row in rows]
    few = [{**row, "limit": 4, "run_id": f"{row['run_id']}-4"} for row in rows]
    write_results(tmp_path / "sweep.csv", [*rows, *other, *few])
    ((first, *_),) = tables(tmp_path / "sweep.csv", resamples=100).values()
    names = ["tiny2 tiny_mcq 0.5", "tiny tiny_mcq 0.5 first 4", "tiny tiny_mcq 0.5"]
    assert [*first] == ["changed", *names]
    assert all(first.values())


def test_a_file_without_defaults_is_refused(tmp_path: Path) -> None:
    entry = entries()
    for wrong in (entry[:1], [entry[0], entry[2]], [entry[0], entry[1], entry[3]]):
        with pytest.raises(ValueError, match="methods at their defaults"):
            tables(write_sweep(tmp_path, wrong))
    rows = [{"method": m, "method_parameters": json.dumps(p)} for m, p, *_ in entry]
    assert varied(rows) == {"iwp": {"layer": 2, "heads": "mean"}}


def test_several_methods_have_a_table_each(tmp_path: Path) -> None:
    """Each with the methods of one setting, without the other that is varied."""
    more = [("hawk", {"weights": w}, 0, scores) for w, scores in ((None, FULL), ("file", np.zeros(N)))]
    results = write_sweep(tmp_path, [*entries(), *more])
    found = {method: [row["changed"] for row in rows] for method, rows in tables(results, resamples=50).items()}
    assert found == {
        "iwp": ["iwp, defaults", "layer=4", "heads=max", "layer=1", "random"],
        "hawk": ["hawk, defaults", "random", "weights=file"],
    }
    write(results, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Sensitivity of `iwp`, `hawk` to their parameters")
    assert page.index("## `iwp`") < page.index("`heads=mean`, `layer=2`") < page.index("## `hawk`")


def test_the_page_keeps_what_was_written_under_the_table(tmp_path: Path) -> None:
    results, page = write_sweep(tmp_path, entries()), tmp_path / "page.md"
    write(results, page)
    first = page.read_text()
    assert "| layer=4" in first
    assert "`heads=mean`, `layer=2`" in first
    page.write_text(first + "\nWhat it means.\n\nIn two paragraphs.\n")
    write(results, page)
    write(results, page)
    assert page.read_text() == first + "\nWhat it means.\n\nIn two paragraphs.\n"
