"""How much each parameter of a method matters: one value changed at a time against the defaults, paired, as Markdown.

``ivcp sensitivity results/iwp_sensitivity.csv docs/iwp_sensitivity.md`` reads the CSV of a sweep with
one method at its defaults and with single parameters changed. Other methods in it (``random``) are compared too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivcp_eval import benchmarks
from ivcp_eval.files import atomic_write
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports.stats import holm, paired_bootstrap
from ivcp_eval.reports.table import Row, read_results, read_samples


def defaults_of(rows: Sequence[Row]) -> tuple[str, dict[str, Any]]:
    """The method that the file varies, and its parameters in the first row from which all others differ in one at most.

    Raises:
        ValueError: there is no such row.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] != BASELINE:
            found = by_method.setdefault(row["method"], [])
            parameters = json.loads(row["method_parameters"] or "{}")
            found += [] if parameters in found else [parameters]
    method, found = max(by_method.items(), key=lambda item: len(item[1]), default=("", []))
    for usual in found if len(found) > 1 else []:
        if all(sum(usual[name] != other[name] for name in usual) <= 1 for other in found):
            return method, usual
    raise ValueError(
        "the file must hold one method at its defaults and with single parameters changed, as sweeps/"
        "iwp_sensitivity.yaml lays out"
    )


def table(results: Path, resamples: int = 2000) -> list[dict[str, str]]:
    """Rows of text cells: what was changed, and one column per benchmark and ratio.

    A cell is the headline score for the defaults, else its paired difference to them with the 95 % interval over
    clusters; ``*`` marks p < 0.05 after Holm's correction over the whole table. Seeds of one method are averaged.

    Raises:
        ValueError: see `defaults_of`; or a sample is missing somewhere.
    """
    rows = [row for row in read_results(results) if row["status"] == "ok" and row["metric"] == _headline(row)]
    method, usual = defaults_of(rows)
    groups: dict[str, dict[tuple[str, float], list[Row]]] = {}
    for row in rows:
        if row["method"] != BASELINE:
            column = row["benchmark"], row["ratio_asked"]
            groups.setdefault(_label(row, method, usual), {}).setdefault(column, []).append(row)
    first, columns = groups.pop(""), sorted({column for group in groups.values() for column in group}, reverse=True)
    tested: list[tuple[str, str, float]] = []
    cells: dict[str, dict[str, str]] = {f"{method}, defaults": {}}
    for column in columns:
        title = f"{column[0]} {column[1]:g}"
        (reference,) = first[column]
        before, clusters = _scores(results.parent, [reference])
        cells[f"{method}, defaults"][title] = f"{reference['score']:.1f}"
        for label, group in groups.items():
            after, _ = _scores(results.parent, group[column])
            paired = paired_bootstrap(
                before, after, clusters, scale=float(reference["score_scale"]), resamples=resamples
            )
            low, high = paired.difference_interval.low, paired.difference_interval.high
            cells.setdefault(label, {})[title] = f"{paired.difference:+.1f} ({low:+.1f} to {high:+.1f})"
            tested.append((label, title, paired.p_value))
    for (label, title, _), p in zip(tested, holm([p for *_, p in tested]), strict=True):
        cells[label][title] += " *" if p < 0.05 else ""
    return [{"changed": label, **found} for label, found in cells.items()]


def _headline(row: Row) -> str:
    return benchmarks.load(row["benchmark"]).metrics[0].name


def _label(row: Row, method: str, usual: Mapping[str, Any]) -> str:
    if row["method"] != method:
        return str(row["method"])
    parameters = json.loads(row["method_parameters"])
    return ", ".join(f"{name}={parameters[name]}" for name in usual if parameters[name] != usual[name])


def _scores(folder: Path, group: Sequence[Row]) -> tuple[np.ndarray, list[str]]:
    """Per-sample scores in the order of the index, mean over the rows' seeds, and the clusters."""
    found = []
    for row in group:
        samples = sorted(read_samples(folder / row["predictions"]), key=lambda sample: sample["index"])
        found.append(([s["index"] for s in samples], [s["score"] for s in samples], [s["cluster"] for s in samples]))
    if any(entry[0] != found[0][0] for entry in found):
        raise ValueError(f"rows of {group[0]['method']} on {group[0]['benchmark']} have unlike samples")
    return np.mean([entry[1] for entry in found], axis=0, dtype=float), found[0][2]


def markdown(results: Path, note: str = "") -> str:
    """The page: what the table is, how it was made, the table."""
    from tabulate import tabulate

    rows = read_results(results)
    method, usual = defaults_of(rows)
    measured = next(row for row in rows if row["method"] == method)
    made = {
        "defaults": ", ".join(f"`{name}={value}`" for name, value in usual.items()),
        "model": f"`{measured['model']}`, weights {measured['revision']}, {measured['dtype']} on {measured['device']}",
        "versions": f"ivcp-eval {measured['ivcp_commit'][:12]}, torch {measured['torch_version']}, transformers "
        f"{measured['transformers_version']}, {measured['vlmeval_version']}",
    }
    return "\n".join(
        [
            f"# Sensitivity of `{method}` to its parameters",
            "",
            "One parameter changed at a time. First row: the score at the defaults. Others: the difference to it on "
            "the same samples, with its 95 % interval (bootstrap over pictures); `*`: p < 0.05 after Holm's correction "
            "over the table. Columns: benchmark and retention ratio. Generated by `ivcp sensitivity`.",
            "",
            *(f"* {name}: {text}" for name, text in made.items()),
            "",
            tabulate(table(results), headers="keys", tablefmt="github", disable_numparse=True),
            "",
            *([note, ""] if note else []),
        ]
    )


def write(results: Path, page: Path) -> None:
    """Write the page; what follows the table is kept from the page that stands there."""
    before = page.read_text(encoding="utf-8").rpartition("|\n")[2].strip() if page.is_file() else ""
    with atomic_write(page) as stream:
        stream.write(markdown(results, before))
