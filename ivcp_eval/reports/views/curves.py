"""Score against retention ratio, with intervals, and which methods beat random: a CSV and a plot from a results CSV.

``ivcp curves results/tiny.csv`` writes ``results/tiny.curves.csv`` and ``results/tiny.curves.png``.
Every point is a row of `compare`, once against the unpruned rows and once against the rows of ``random`` (the mean of
its seeds) at the same ratio, or at the same share of the same budget. A method that is not significantly better than
random there is marked as such. Where a budget was held, the plot is against what was measured of it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ivcp_eval.files import as_shown, atomic_write, commit_file, disk_full_as_clear_error
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.comparison import ComparedRow
from ivcp_eval.reports.provenance import AGAIN, VARIANT, NotComparable, finished_headline, variant_key
from ivcp_eval.reports.table import read_results

ENTRIES = 30  # of a column of the legend
BETTER = "better than random"
CONTROL = "random"
COLUMNS = (
    *VARIANT,
    *("ratio_method", "ratio_kept_final", "ratio_layer_mean", "ratio_kv_cache", "ratio_flops"),
    *("score", "n_seeds", "score_lowest_seed", "score_highest_seed", "baseline"),
    *("difference", "difference_low", "difference_high", "paired"),
    *("random", "over_random", "over_random_low", "over_random_high", "p_over_random_holm", "verdict", "n", "clusters"),
    *("again_difference", "again_answers_changed"),
)
#: Kind of budget -> column that is plotted against, and its name on the axis; "" is the methods' own ratio.
AXES = {
    "": ("ratio_asked", "retention ratio asked"),
    "final": ("ratio_kept_final", "measured visual tokens after the last cut"),
    "layer_mean": ("ratio_layer_mean", "measured visual tokens, mean over layers"),
    "flops": ("ratio_flops", "measured share of the prefill's FLOPs"),
}


def curve_rows(results: Path, resamples: int = 10_000) -> list[dict[str, Any]]:
    """One row per benchmark and pruned variant, headline metric only; the schema is `COLUMNS`.

    Differences are in the metric's own units; ``again_*`` are `ComparedRow.noise_floor`. ``verdict`` is "better than
    random", "worse than random" or "not distinguishable from random" at 5 % after Holm's correction over all rows, ""
    for random itself.

    Raises:
        ValueError: a benchmark has no finished unpruned row; or as `compare`.
    """
    chosen = [row for row in read_results(results) if finished_headline(row)]
    unpruned = {(row["model"], row["benchmark"]) for row in chosen if row["method"] == BASELINE}
    for row in chosen:
        if (row["model"], row["benchmark"]) not in unpruned:
            raise ValueError(f"{row['benchmark']}: no finished unpruned row to compare with; run the sweep to its end")
    # Correction must leave room below 5 % for the smallest p-value that so many permutations can give.
    resamples = max(resamples, 40 * len(chosen))
    rows = compare(results, resamples=resamples, select=finished_headline).rows
    beside: dict[tuple[Any, ...], ComparedRow] = {}
    if {row["method"] for row in chosen} - {BASELINE} > {CONTROL}:
        with suppress(NotComparable):  # random stands at other ratios only
            found = compare(results, against=CONTROL, resamples=resamples, select=finished_headline)
            beside = {variant_key(row): row for row in found.rows}
    return [_point(row, beside.get(variant_key(row))) for row in rows]


def _point(row: ComparedRow, over: ComparedRow | None) -> dict[str, Any]:
    """``over``: the row against random, where there is one."""
    verdict = "" if over is None else "not distinguishable from random"
    if over is not None and over.p_holm < 0.05:
        verdict = BETTER if over.difference > 0 else "worse than random"
    return {
        **{name: getattr(row, name) for name in COLUMNS if hasattr(row, name)},
        "settings": row.settings,
        "score": row.score_pruned,
        "baseline": row.score_baseline,
        "random": over and over.score_baseline,
        "over_random": over and over.difference,
        "over_random_low": over and over.difference_low,
        "over_random_high": over and over.difference_high,
        "p_over_random_holm": over and over.p_holm,
        "verdict": verdict,
        "n": row.n_samples,
        "clusters": row.n_clusters,
        "again_difference": row.noise_floor.difference,
        "again_answers_changed": row.noise_floor.answers_changed,
    }


def label(row: Mapping[str, Any]) -> str:
    """Legend entry: the method, with what tells its variants apart."""
    return f"{row['method']}({row['settings']})" if row["settings"] else str(row["method"])


def _panel(row: Mapping[str, Any]) -> tuple[str, str, int, str]:
    """Rows of one panel were measured on the same questions, at the same kind of cost."""
    return row["model"], row["benchmark"], row["limit"] or 0, row["budget"]


def curve(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[float, float, float, float]]:
    """(share, score, half intervals below and above) of one method, by increasing ratio."""
    return [
        (
            row[column],
            row["score"],
            row["difference"] - row["difference_low"],
            row["difference_high"] - row["difference"],
        )
        for row in sorted(rows, key=lambda row: float(row["ratio_asked"]))
    ]


def write_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel per model, benchmark, limit and budget: score against what is held.

    Bars are 95 % intervals of the difference to the baseline; the grey stripe around it is the noise floor. Where rows
    were computed in several ways, each way's baseline is there.

    Raises:
        ValueError: a row lacks the measured share of what it holds.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["method"] != AGAIN] or rows  # it is the stripe
    panels = sorted({_panel(row) for row in rows})
    several = len({model for model, *_ in panels}) > 1
    labels = sorted({label(row) for row in rows})
    colours = dict(zip(labels, pyplot.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    columns = -(-len(labels) // ENTRIES)  # of the legend, which stands beside the panels
    size = (5.5 * len(panels) + 1.9 * columns, 5)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        model, name, limit, budget = panel
        here = [row for row in rows if _panel(row) == panel]
        column, words = AXES[budget.partition("(")[0]]
        if any(math.isnan(row[column]) for row in here):
            raise ValueError(f"{name}: rows that hold {budget} have no {column}; run the sweep again to measure it")
        floors = {row["baseline"]: abs(row["again_difference"]) for row in here}
        for score, floor in sorted(floors.items()):
            axis.axhline(score, color="black", linewidth=1, label="unpruned")
            if floor > 0:  # none was measured, or no benchmark changed its score
                axis.axhspan(
                    score - floor, score + floor, color="grey", alpha=0.3, linewidth=0, label="A/A noise floor"
                )
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
        first = f", first {limit}" if limit else ""
        axis.set(title=f"{f'{model} ' * several}{name} ({here[0]['metric']}{first})", xlabel=words)
    handles = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=7, ncols=columns, loc="outside right upper")
    unpaired = sum(not row["paired"] for row in rows)
    what = (
        "paired difference"
        if not unpaired
        else "difference"
        if unpaired == len(rows)
        else "difference, paired where samples are known,"
    )
    figure.suptitle(
        f"bars: 95 % interval of the {what} to the unpruned model\nhollow: not better than random; {_floor(rows)}",
        fontsize=9, x=0.01, ha="left",  # beside the legend
    )  # fmt: skip
    temporary = path.with_suffix(".tmp.png")
    with disk_full_as_clear_error(path, temporary):
        figure.savefig(temporary, dpi=110)
        pyplot.close(figure)
        commit_file(temporary, path)


def _floor(rows: Sequence[Mapping[str, Any]]) -> str:
    """The noise floor in words."""
    known = [abs(row["again_difference"]) for row in rows if not math.isnan(row["again_difference"])]
    if not known:
        return "no noise floor was measured"
    return (
        "grey: the unpruned model's second answers" if any(known) else "noise floor: 0, no benchmark changed its score"
    )


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(_cell(row[name])) for name in names)


def _paired_before(table: Path) -> tuple[list[str], set[tuple[str, ...]]]:
    """What names the rows of a table whose differences are paired, and by which columns, which may be those of an older
    version; none where there is no such table."""
    if not table.is_file():
        return [], set()
    with table.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        names = [name for name in VARIANT if name in (reader.fieldnames or ())]
        return names, {_key(row, names) for row in reader if row.get("paired") == "True"}


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return as_shown(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def write(results: Path, resamples: int, plotted: Sequence[str] = (), force: bool = False) -> tuple[Path, Path]:
    """Write ``<results>.curves.csv`` and ``.curves.png`` beside the results; returns both.

    Args:
        plotted: the methods that the plot shows, all if none is named; the CSV and its correction always have all.
        force: replace paired differences by unpaired ones too.

    Raises:
        ValueError: a method to plot is in no row; the table that is there has paired differences of rows whose
            samples are not here now; or as `curve_rows`.
    """
    rows = curve_rows(results, resamples)
    there = sorted({str(row["method"]) for row in rows})
    if missing := sorted(set(plotted) - set(there)):
        raise ValueError(f"{results} has no finished row of {', '.join(missing)}; it has {', '.join(there)}")
    table, plot = results.with_suffix(".curves.csv"), results.with_suffix(".curves.png")
    names, before = _paired_before(table)
    if not force and (lost := before - {_key(row, names) for row in rows if row["paired"]}):
        raise ValueError(
            f"the per-sample files of {len(lost)} rows are not here, whose differences in {table} are paired; they "
            "would become unpaired, with much wider intervals. Run the sweep again, or pass --force"
        )
    with atomic_write(table) as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(row[name]) for name in COLUMNS})
    write_plot([row for row in rows if not plotted or row["method"] in plotted], plot)
    return table, plot
