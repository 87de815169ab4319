"""Score against retention ratio, with intervals, and which methods beat random: a CSV and a plot from a results CSV.

``ivcp curves results/tiny.csv`` writes ``results/tiny.curves.csv`` and ``results/tiny.curves.png``.
Every point is paired, sample by sample and clustered, with the unpruned rows and with the rows of ``random`` (the mean
of its seeds) at the same ratio, or at the same share of the same budget. A method that is not significantly better than
random there is marked as such. Where a budget was held, the plot is against what was measured of it.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivcp_eval import benchmarks
from ivcp_eval.files import atomic_write
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports.stats import holm, paired_bootstrap
from ivcp_eval.reports.stats.resampling import PairedResult
from ivcp_eval.reports.table import Row, read_results, read_samples

BETTER = "better than random"
CONTROL = "random"
COLUMNS = (
    *("model", "benchmark", "metric", "method", "method_parameters", "ratio_asked", "budget", "ratio_method"),
    *(
        "ratio_kept_final",
        "ratio_layer_mean",
        "ratio_kv_cache",
        "ratio_flops",
        "score",
        "baseline",
        "difference",
        "difference_low",
        "difference_high",
    ),
    *("random", "over_random", "over_random_low", "over_random_high", "p_over_random_holm", "verdict", "n", "clusters"),
)
#: Kind of budget -> column that is plotted against, and its name on the axis; "" is the methods' own ratio.
AXES = {
    "": ("ratio_asked", "retention ratio asked"),
    "final": ("ratio_kept_final", "measured visual tokens after the last cut"),
    "layer_mean": ("ratio_layer_mean", "measured visual tokens, mean over layers"),
    "flops": ("ratio_flops", "measured share of the prefill's FLOPs"),
}


def curve_rows(results: Path, resamples: int = 2000) -> list[dict[str, Any]]:
    """One row per benchmark and pruned variant, headline metric only; the schema is `COLUMNS`.

    Differences are in the metric's own units. ``verdict`` is "better than random", "worse than random" or "not
    distinguishable from random" at 5 % after Holm's correction over all rows, "" for random itself.

    Raises:
        ValueError: the file has no unpruned row or no per-sample predictions to pair with.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in read_results(results):
        if row["status"] == "ok" and row["metric"] == _headline(row):
            groups[row["model"], row["benchmark"]].append(row)
    # Correction must leave room below 5 % for the smallest p-value that so many permutations can give.
    resamples = max(resamples, 40 * sum(map(len, groups.values())))
    made = [made for group in groups.values() for made in _benchmark_rows(group, results.parent, resamples)]
    tested = [row for row in made if row["p_over_random_holm"] is not None]
    for row, p in zip(tested, holm([row["p_over_random_holm"] for row in tested]), strict=True):
        row["p_over_random_holm"] = float(p)
        if p < 0.05:
            row["verdict"] = BETTER if row["over_random"] > 0 else "worse than random"
        else:
            row["verdict"] = "not distinguishable from random"
    return made


def _headline(row: Row) -> str:
    declared = benchmarks.load(row["benchmark"]).metrics if row["benchmark"] in benchmarks.names() else ()
    return declared[0].name if declared else row["metric"]


def _benchmark_rows(group: Sequence[Row], folder: Path, resamples: int) -> list[dict[str, Any]]:
    samples = {row["run_id"]: _scores(folder / row["predictions"]) for row in group}
    baselines = [row for row in group if row["method"] == BASELINE]
    if not baselines:
        raise ValueError(f"{group[0]['benchmark']}: no finished unpruned row to compare with; run the sweep to its end")
    indices, before, clusters = samples[baselines[0]["run_id"]]
    random: dict[tuple[str, float], list[np.ndarray]] = defaultdict(list)
    for row in group:
        if row["method"] == CONTROL:
            random[row["budget"], row["ratio_asked"]].append(samples[row["run_id"]][1])

    def paired(control: np.ndarray, after: np.ndarray, scale: float) -> PairedResult:
        return paired_bootstrap(control, after, clusters, scale=scale, resamples=resamples)

    made = []
    for row in (row for row in group if row["method"] != BASELINE):
        if samples[row["run_id"]][0] != indices:
            raise ValueError(f"{row['benchmark']}: {row['method']} has other samples than the unpruned rows")
        after, scale = samples[row["run_id"]][1], float(row["score_scale"])
        against = paired(before, after, scale)
        beside = None
        cost = row["budget"], row["ratio_asked"]
        if row["method"] != CONTROL and cost in random:
            beside = paired(np.mean(random[cost], axis=0), after, scale)
        made.append(
            {
                **{name: row[name] for name in COLUMNS if name in row},
                "baseline": baselines[0]["score"],
                "difference": against.difference,
                "difference_low": against.difference_interval.low,
                "difference_high": against.difference_interval.high,
                "random": beside.baseline if beside else None,
                "over_random": beside.difference if beside else None,
                "over_random_low": beside.difference_interval.low if beside else None,
                "over_random_high": beside.difference_interval.high if beside else None,
                "p_over_random_holm": beside.p_value if beside else None,
                "verdict": "",
                "n": against.n_samples,
                "clusters": against.n_clusters,
            }
        )
    return made


def _scores(path: Path) -> tuple[list[str], np.ndarray, list[str]]:
    rows = read_samples(path)
    return [r["index"] for r in rows], np.array([r["score"] for r in rows], dtype=float), [r["cluster"] for r in rows]


def label(row: Mapping[str, Any]) -> str:
    """Legend entry: the method, and that its coordinates are off where they are."""
    return f"{row['method']} without IVC" if '"ivc":0.0' in str(row["method_parameters"]) else str(row["method"])


def curve(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[float, float, float, float]]:
    """(share, score, half intervals below and above) of one method, seeds of one ratio joined, by increasing ratio."""
    by_ratio: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_ratio[row["ratio_asked"]].append(row)

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    return [
        (
            mean(row[column] for row in seeds),
            mean(row["score"] for row in seeds),
            mean(row["difference"] - row["difference_low"] for row in seeds),
            mean(row["difference_high"] - row["difference"] for row in seeds),
        )
        for _, seeds in sorted(by_ratio.items())
    ]


def write_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel per benchmark and budget: score against what is held, 95 % intervals of the difference to the baseline.

    Raises:
        ValueError: a row lacks the measured share of what it holds.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row["benchmark"], row["budget"]) for row in rows})
    labels = sorted({label(row) for row in rows})
    colours = dict(zip(labels, pyplot.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 5), squeeze=False, layout="constrained")
    for axis, (name, budget) in zip(axes[0], panels, strict=True):
        here = [row for row in rows if (row["benchmark"], row["budget"]) == (name, budget)]
        column, words = AXES[budget.partition("(")[0]]
        if any(row[column] is None for row in here):
            raise ValueError(f"{name}: rows that hold {budget} have no {column}; run the sweep again to measure it")
        axis.axhline(here[0]["baseline"], color="black", linewidth=1, label="unpruned")
        for number, entry in enumerate(labels):
            points = curve([row for row in here if label(row) == entry], column)
            if not points:
                continue
            offset = (number - len(labels) / 2) * 0.002
            share, score, low, high = zip(*points, strict=True)
            axis.errorbar(
                [x + offset for x in share], score, yerr=[low, high], label=entry, color=colours.get(entry),
                marker="o", markersize=3, linewidth=2.2 if entry.startswith("ivc") else 1, capsize=2,
            )  # fmt: skip
            weak = [row for row in here if label(row) == entry and row["verdict"] and row["verdict"] != BETTER]
            axis.plot(
                [x + offset for x, *_ in curve(weak, column)], [y for _, y, *_ in curve(weak, column)],
                linestyle="none", marker="o", markersize=5, markerfacecolor="white", color=colours.get(entry), zorder=3,
            )  # fmt: skip
        axis.set(title=f"{name} ({here[0]['metric']})", xlabel=words)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(
        "bars: 95 % interval of the paired difference to the unpruned model; hollow: not better than random", fontsize=9
    )
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    pyplot.close(figure)
    temporary.replace(path)


def write(results: Path, resamples: int) -> tuple[Path, Path]:
    """Write ``<results>.curves.csv`` and ``.curves.png`` beside the results; returns both."""
    rows = curve_rows(results, resamples)
    table, plot = results.with_suffix(".curves.csv"), results.with_suffix(".curves.png")
    with atomic_write(table) as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({name: "" if rounded[name] is None else rounded[name] for name in COLUMNS})
    write_plot(rows, plot)
    return table, plot
