"""Curves: the difference to random is found where it is and denied where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ivcp_eval.reports import stats
from ivcp_eval.reports.table import make_row, read_results, write_results, write_samples
from ivcp_eval.reports.views import curves
from ivcp_eval.reports.views.curves import AXES, curve, curve_rows, write

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


def test_paired_differences_are_not_replaced_by_unpaired_ones_unasked(tmp_path: Path) -> None:
    path = _sweep(tmp_path, _scores())
    table, plot = write(path, resamples=200)
    before = table.read_bytes(), plot.read_bytes()
    for samples in tmp_path.glob("*-[01].csv"):
        samples.unlink()
    with pytest.raises(ValueError, match=r"per-sample files of 4 rows are not here.*--force"):
        write(path, resamples=200)
    assert (table.read_bytes(), plot.read_bytes()) == before
    write(path, resamples=200, force=True)
    assert "True" not in table.read_text()
    write(path, resamples=200)  # nothing paired is lost any more


def test_random_at_other_ratios_only_says_nothing(tmp_path: Path) -> None:
    path = _sweep(tmp_path, _scores())
    rows = read_results(path)
    for row in rows:
        row["ratio_asked"] = 0.3 if row["method"] == "random" else row["ratio_asked"]
    write_results(path, rows)
    found = {row["method"]: row for row in curve_rows(path, resamples=200)}
    assert (found["fastv"]["random"], found["fastv"]["verdict"]) == (None, "")


def test_a_held_budget_is_compared_at_equal_cost_and_plotted_against_what_was_measured(tmp_path: Path) -> None:
    path = _sweep(tmp_path, _scores())
    rows = read_results(path)
    measured = {"random": 0.61, "fastv": 0.59, "uniform": 0.62, "divprune": 0.6}
    for row in rows:
        if row["method"] in ("random", "fastv"):
            row |= {"budget": "flops(1024+64)", "ratio_flops": measured[row["method"]], "ratio_method": 0.4}
    write_results(path, rows)
    found = {row["method"]: row for row in curve_rows(path, resamples=200)}
    assert found["fastv"]["random"] is not None
    assert found["uniform"]["random"] is None  # the same 0.5, of something else
    assert curve([found["fastv"]], AXES["flops"][0])[0][0] == 0.59
    assert curve([found["uniform"]], AXES[""][0])[0][0] == 0.5
    write(path, resamples=200)
    for row in rows:
        row["ratio_flops"] = None
    write_results(path, rows)
    with pytest.raises(ValueError, match=r"hold flops\(1024\+64\) have no ratio_flops"):
        write(path, resamples=200)


def test_seeds_are_one_point_with_their_spread(tmp_path: Path) -> None:
    scores = _scores()
    (random,) = [row for row in curve_rows(_sweep(tmp_path, scores)) if row["method"] == "random"]
    both = [scores["random", seed] for seed in (0, 1)]
    assert random["n_seeds"] == 2
    assert random["score"] == pytest.approx(100 * np.mean(both))
    spread = sorted(100 * values.mean() for values in both)
    assert [random["score_lowest_seed"], random["score_highest_seed"]] == pytest.approx(spread)
    expected = stats.paired_bootstrap(scores["none", 0], np.mean(both, axis=0), np.arange(N) // 2, scale=100)
    width = expected.difference_interval.high - expected.difference_interval.low
    assert random["difference"] == pytest.approx(expected.difference)
    assert random["difference_low"] == pytest.approx(expected.difference_interval.low, abs=0.08 * width)


def test_points_are_in_the_order_of_the_ratio() -> None:
    rows = [
        {"ratio_asked": ratio, "score": score, "difference": -10, "difference_low": -14, "difference_high": -7}
        for ratio, score in ((0.5, 60), (0.25, 30))
    ]
    assert curve(rows, "ratio_asked") == [(0.25, 30, 4, 3), (0.5, 60, 4, 3)]


def test_files_are_written_beside_the_results(tmp_path: Path) -> None:
    path = _sweep(tmp_path, _scores())
    write(path, resamples=200)
    assert (tmp_path / "sweep.curves.csv").read_text().count("\n") == 1 + 4
    assert (tmp_path / "sweep.curves.png").read_bytes()[:4] == b"\x89PNG"


def test_models_limits_and_parameters_are_not_drawn_as_one_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    rows = read_results(_sweep(tmp_path, {("none", 0): np.ones(N), ("fastv", 0): np.ones(N)}))
    other = [{**row, "model": "tiny2", "run_id": f"{row['run_id']}-2"} for row in rows]
    few = [{**row, "limit": 4, "run_id": f"{row['run_id']}-4"} for row in rows]
    layer = {**rows[1], "run_id": "3", "method_parameters": '{"layer":3}', "set_parameters": "layer"}
    write_results(tmp_path / "sweep.csv", [*rows, *other, *few, layer])
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    write(tmp_path / "sweep.csv", resamples=200)
    axes = pyplot.gcf().axes
    assert [axis.get_title() for axis in axes] == [
        "tiny tiny_mcq (accuracy)",
        "tiny tiny_mcq (accuracy, first 4)",
        "tiny2 tiny_mcq (accuracy)",
    ]
    assert axes[0].get_legend_handles_labels()[1] == ["unpruned", "fastv", "fastv(layer=3)"]


def test_some_methods_are_plotted_and_all_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plotted: list[str] = []
    monkeypatch.setattr(curves, "write_plot", lambda rows, path: plotted.extend(row["method"] for row in rows))
    path = _sweep(tmp_path, _scores())
    write(path, resamples=200, plotted=["fastv"])
    assert set(plotted) == {"fastv"}
    assert (tmp_path / "sweep.curves.csv").read_text().count("\n") == 1 + 4
    with pytest.raises(ValueError, match=r"no finished row of fastw; it has .*fastv"):
        write(path, resamples=200, plotted=["fastw"])


def test_without_an_unpruned_row_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished unpruned row"):
        curve_rows(_sweep(tmp_path, _scores(), with_baseline=False))
