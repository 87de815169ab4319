"""How much each parameter of a method matters: one value changed at a time against the defaults, as Markdown.

A view of `compare`'s rows against the method at its defaults.

``ivcp sensitivity results/iwp_sensitivity.csv docs/sensitivity/iwp.md`` reads the CSV of a sweep with methods at their
defaults and with single parameters changed, a table for each. Methods with one setting (``random``) are in every table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivcp_eval.files import atomic_write
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.comparison import ComparedRow
from ivcp_eval.reports.provenance import Reference, finished_headline
from ivcp_eval.reports.table import Row, read_results
from ivcp_eval.reports.terminal import floor_text


def varied(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The methods that the file varies, and of each the parameters from which all its other rows differ in one at most.

    Raises:
        ValueError: no method is varied, or one has no such row.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] != BASELINE:
            settings = by_method.setdefault(row["method"], [])
            parameters = json.loads(row["method_parameters"] or "{}")
            settings += [] if parameters in settings else [parameters]
    usual = {method: _centre(settings) for method, settings in by_method.items() if len(settings) > 1}
    if not usual or None in usual.values():
        missing = ", ".join(method for method, defaults in usual.items() if defaults is None) or "there is none"
        raise ValueError(
            "the file must hold methods at their defaults and with single parameters changed, as sweeps/"
            f"iwp_sensitivity.yaml lays out; not so: {missing}"
        )
    return {method: defaults for method, defaults in usual.items() if defaults is not None}


def _centre(settings: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    near = (one for one in settings if all(sum(one[name] != other[name] for name in one) <= 1 for other in settings))
    return next(near, None)


def tables(results: Path, resamples: int = 10_000) -> dict[str, list[dict[str, str]]]:
    """Of each method that is varied rows of text cells: what was changed, and one column per benchmark and ratio.

    A cell is the headline score for the defaults, else its paired difference to them with the 95 % interval over
    clusters; ``*`` marks p < 0.05 after Holm's correction over the whole table. Seeds of one method are averaged.

    Raises:
        ValueError: see `varied` and `compare`.
    """
    methods = varied([row for row in read_results(results) if finished_headline(row)])
    return {method: _table(results, method, methods, resamples) for method in methods}


def _table(results: Path, method: str, methods: Mapping[str, dict[str, Any]], resamples: int) -> list[dict[str, str]]:
    def selected(row: Row) -> bool:
        return finished_headline(row) and (row["method"] == method or row["method"] not in methods)

    usual = methods[method]
    compared = compare(results, against=Reference(method, usual), resamples=resamples, select=selected).rows
    several = len({row.model for row in compared}) > 1
    titles = {
        place: " ".join(
            filter(None, (place[0] * several, place[1], f"{ratio:g}", budget, f"first {limit}" * bool(limit)))
        )
        for place in sorted({_place(row) for row in compared}, reverse=True)
        for ratio, budget, limit in [place[2:]]
    }
    first = f"{method}, defaults"
    cells: dict[str, dict[str, str]] = {first: dict.fromkeys(titles.values(), "")}
    for row in compared:
        title = titles[_place(row)]
        cells[first][title] = f"{row.score_baseline:.1f}"
        if floor := floor_text(row.noise_floor, 1):
            cells.setdefault("A/A", dict.fromkeys(titles.values(), ""))[title] = floor
        cells.setdefault(_label(row, method, usual), dict.fromkeys(titles.values(), ""))[title] = _cell(row)
    return [{"changed": label, **by_column} for label, by_column in cells.items()]


def _place(row: ComparedRow) -> tuple[str, str, float, str, int]:
    return row.model, row.benchmark, row.ratio_asked, row.budget, row.limit or 0


def _cell(row: ComparedRow) -> str:
    interval = (
        "no interval"
        if math.isnan(row.difference_low)
        else (f"{row.difference_low:+.1f} to {row.difference_high:+.1f}")
    )
    unpaired = "" if row.paired else ", unpaired"
    return f"{row.difference:+.1f} ({interval}{unpaired})" + (" *" if row.p_holm < 0.05 else "")


def _label(row: ComparedRow, method: str, usual: Mapping[str, Any]) -> str:
    if row.method != method:
        return row.method
    parameters = json.loads(row.method_parameters or "{}")
    return ", ".join(f"{name}={parameters[name]}" for name in usual if parameters[name] != usual[name])


def markdown(results: Path, note: str = "") -> str:
    """The page: what the tables are, how they were made, the tables."""
    from tabulate import tabulate

    rows = read_results(results)
    methods = varied([row for row in rows if finished_headline(row)])
    measured = next(row for row in rows if row["method"] in methods)
    names, several = ", ".join(f"`{method}`" for method in methods), len(methods) > 1
    lines = [
        f"# Sensitivity of {names} to {'their' if several else 'its'} parameters",
        "",
        "One parameter changed at a time. First row: the score at the defaults. Others: the difference to it on "
        "the same samples, with its 95 % interval (bootstrap over pictures); `*`: p < 0.05 after Holm's correction "
        "over the table. A/A, where it was measured: the unpruned model's second answers against its first, difference "
        "and answers whose text changed. Columns: benchmark and retention ratio. Generated by `ivcp sensitivity`.",
        "",
        f"* model: `{measured['model']}`, weights {measured['revision']}, {measured['dtype']} on {measured['device']}",
        f"* versions: ivcp-eval {measured['ivcp_commit'][:12]}, torch {measured['torch_version']}, transformers "
        f"{measured['transformers_version']}, {measured['vlmeval_version']}",
    ]
    for method, table in tables(results).items():
        lines += ["", f"## `{method}`"] if several else []
        usual = ", ".join(f"`{name}={value}`" for name, value in methods[method].items())
        lines += [
            *([""] if several else []),
            f"* defaults: {usual}",
            "",
            tabulate(table, headers="keys", tablefmt="github", disable_numparse=True),
        ]
    return "\n".join([*lines, "", *([note, ""] if note else [])])


def write(results: Path, page: Path) -> None:
    """Write the page; what follows the table is kept from the page that stands there."""
    before = page.read_text(encoding="utf-8").rpartition("|\n")[2].strip() if page.is_file() else ""
    with atomic_write(page) as stream:
        stream.write(markdown(results, before))
