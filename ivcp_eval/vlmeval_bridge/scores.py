"""Reads the numbers that VLMEvalKit's evaluators leave in their files, as a benchmark's data file says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark, Metric, Samples

if TYPE_CHECKING:
    import pandas as pd


class ScoreMissing(RuntimeError):
    """An evaluator did not leave a number where the benchmark's data file says."""


def read_metrics(benchmark: Benchmark, folder: Path, stem: str, judge: str) -> dict[str, tuple[float, float]]:
    """Every declared metric as name -> (score, scale).

    Args:
        folder, stem: evaluator files are ``<folder>/<stem><ending>``. judge: fills ``{judge}`` in endings.

    Raises:
        ScoreMissing: a file, row, column or number is not there; the message names it and what there is.
    """
    numbers = {}
    for metric in benchmark.metrics:
        try:
            numbers[metric.name] = (_read_metric(metric, folder, stem, judge), metric.scale)
        except ScoreMissing:
            if not metric.optional:
                raise
    return numbers


def read_samples(samples: Samples, folder: Path, stem: str, judge: str) -> dict[str, float]:
    """Per-sample scores in 0..1 by index; NaN where the evaluator gave none."""
    table = read_table(folder, stem, samples.file.format(judge=judge))
    for column in ("index", samples.column, *samples.rows):
        if column not in table:
            raise ScoreMissing(f"{stem}{samples.file} has no column {column!r}; it has {', '.join(map(str, table))}")
    for column, cell in samples.rows.items():
        table = table[table[column].astype(str) == str(cell)]
    values = table[samples.column].map(_number)
    return {str(index): value * samples.factor for index, value in zip(table["index"], values, strict=True)}


def _read_metric(metric: Metric, folder: Path, stem: str, judge: str) -> float:
    file = metric.file.format(judge=judge)
    table = read_table(folder, stem, file)
    columns = metric.column.split("+") if metric.combine == "sum" else [metric.column]
    for column in [*metric.rows, *columns]:
        if column not in table:
            raise ScoreMissing(f"{stem}{file} has no column {column!r}; it has {', '.join(map(str, table))}")
    for column, cell in metric.rows.items():
        table = table[table[column].astype(str) == str(cell)]
    if len(table) != 1 and metric.combine != "mean":
        raise ScoreMissing(f"{stem}{file}: {len(table)} rows match {dict(metric.rows)}, expected one")
    values = [_number(value) for column in columns for value in table[column]]
    total = sum(values) / (len(table) if metric.combine == "mean" else 1)
    if total != total:
        raise ScoreMissing(f"{stem}{file}: {metric.column} is not a number: {table[columns].to_dict('records')}")
    return total * metric.factor


def _number(value: Any) -> float:
    text = str(value).strip().lower()
    if text in ("true", "false"):
        return float(text == "true")
    try:
        return float(text)
    except ValueError:
        return float("nan")


def read_table(folder: Path, stem: str, ending: str) -> pd.DataFrame:
    """The file ``<folder>/<stem><ending>`` as a table; ScoreMissing names what there is if it is not there."""
    import pandas as pd

    path = folder / f"{stem}{ending}"
    if not path.is_file():
        there = ", ".join(sorted(p.name.removeprefix(stem) for p in folder.glob(f"{stem}*"))) or "nothing"
        raise ScoreMissing(f"the evaluator left no {stem}{ending}; it left {there}")
    if path.suffix == ".json":
        return pd.DataFrame([json.loads(path.read_text(encoding="utf-8"))])
    if path.suffix == ".xlsx":
        return pd.read_excel(path)
    # As text: "007" is an index, and "None" a category.
    return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)


def all_numbers(returned: Any) -> dict[str, tuple[float, float]]:
    """Every number of what an evaluator returned, for a data set that declares no metric; on a scale of 100."""
    import pandas as pd

    if isinstance(returned, pd.DataFrame):
        returned = {
            "/".join([*(str(v) for v in row.values() if not _is_number(v)), str(column)]): value
            for row in returned.to_dict("records")
            for column, value in row.items()
        }
    flat = {str(k): float(v) for k, v in dict(returned).items() if _is_number(v)}
    if not flat:
        raise ScoreMissing(f"the evaluator returned no numbers: {returned!r}; declare its metrics under datasets/")
    return {name: (value, 100.0) for name, value in flat.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
