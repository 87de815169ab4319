"""Wide tables as papers print them: one per model, variants as rows, benchmarks as columns; CSV, Markdown and LaTeX.

The headline metric of each benchmark; what is retained of the unpruned score; what was measured of the cost and,
beside the unpruned model, of the time. ``*`` is at a score that differs from the unpruned one at 5 % after Holm's
correction over the tables. Averages stand only where every benchmark of the row has a score: nothing is averaged over
what happens to be there. The seeds of a method that draws are one row.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import agreement
from ivcp_eval.files import as_shown, atomic_write
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports.compare import ComparedRow, compare
from ivcp_eval.reports.comparison import NoiseFloor
from ivcp_eval.reports.provenance import (
    AGAIN,
    PLACED,
    Group,
    NotComparable,
    finished_headline,
    grouped,
    merged,
    variant_key,
)
from ivcp_eval.reports.stats.timing import STAGES, TimeRatio
from ivcp_eval.reports.table import Row, read_results
from ivcp_eval.reports.terminal import FLOOR, floor_text, fold, time_cell, times_note, wrapped

MISSING = "-"
_VARIANT = ("method", "method_parameters", "ratio_asked", "budget", "limit")
_LATEX = str.maketrans(
    {c: "\\" + c for c in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)


_NO_FLOOR = NoiseFloor()


@dataclass(frozen=True)
class Cell:
    """One variant on one benchmark.

    Attributes:
        score: in the metric's unit, mean over seeds. deviation: standard deviation over seeds, None for a single one.
        retained: percent of the unpruned score. significant: differs from it; None if not tested.
        kept, layer_mean: measured shares of the visual tokens. times: stage -> over the unpruned model's.
        again: noise floor of the benchmark.
    """

    score: float
    deviation: float | None = None
    retained: float | None = None
    significant: bool | None = None
    kept: float | None = None
    layer_mean: float | None = None
    times: Mapping[str, TimeRatio] = field(default_factory=dict)
    again: NoiseFloor = _NO_FLOOR


@dataclass(frozen=True)
class Line:
    """One variant: its name with the parameters that are not defaults, what was asked for, its cells by benchmark, and
    where it was computed, if the table has several such places."""

    method: str
    ratio: float
    budget: str
    limit: int | None
    seeds: int
    cells: Mapping[str, Cell]
    where: str = ""

    @property
    def share(self) -> str:
        """``0.5``, or ``0.6 layer_mean`` where a budget was held."""
        first = f" (first {self.limit})" if self.limit else ""
        return f"{self.ratio:g} {self.budget}".rstrip() + first

    def mean(self, field: str, names: Sequence[str]) -> float | None:
        """Mean of a field of the cells over all benchmarks of the table; None if one lacks it."""
        values = [getattr(self.cells.get(name), field, None) for name in names]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(names) else None


@dataclass(frozen=True)
class Table:
    """One model's table.

    Attributes:
        model: short name. names: benchmarks, in the order of the columns. lines: variants. note: what holds for all.
    """

    model: str
    names: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str = ""

    def to_csv(self) -> str:
        """Numbers only; per benchmark score, share retained, significance, deviation over seeds; then the times."""
        columns = [(name, field) for name in self.names for field in ("score", "retained", "significant", "deviation")]
        words = {"score": "", "retained": " retained %", "significant": " significant", "deviation": " sd over seeds"}
        floors = [name for name in self.names if self._floors]
        floor_heads = [f"{name} A/A{part}" for name in floors for part in ("", " answers changed")]
        header = ["method", "ratio", "budget", "limit", "seeds", "kept", "layer_mean"]
        timed = [(name, stage) for name in self.names for stage in STAGES if self._is_timed]
        time_heads = [f"{name} {stage} time{part}" for name, stage in timed for part in ("", " low", " high", " n")]
        rows = [[*header, *(name + words[field] for name, field in columns), "retained %", *time_heads, *floor_heads]]
        for line in self.lines:
            cells = [getattr(line.cells.get(name), field, None) for name, field in columns]
            means = [line.mean(field, self.names) for field in ("kept", "layer_mean", "retained")]
            times = [value for name, stage in timed for value in _time_values(line.cells.get(name), stage)]
            values = [line.ratio, line.budget, line.limit, line.seeds, *means[:2], *cells, means[2], *times]
            values += [value for name in floors for value in _floor_values(line.cells.get(name))]
            rows.append([line.method, *map(_csv_cell, values)])
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(
            [[as_shown(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
        )
        return stream.getvalue()

    def to_markdown(self) -> str:
        """Markdown tables under the model's name: scores, retained shares, times; aligned also as plain text."""
        parts = [f"### {self.model}", ""]
        for title, rows, _ in self._parts():
            parts += [*([title, ""] if title else []), *_markdown(rows), ""]
        return "\n".join([*parts, *([self.note, ""] if self.note else [])])

    def to_terminal(self, width: int | None = None) -> str:
        """The tables of `to_markdown`, folded to the terminal's width."""
        parts = [f"model {self.model}"]
        for title, rows, names in self._parts():
            parts += ["", *([title, ""] if title else []), _folded(rows, names, width)]
        return "\n".join([*parts, *(["", wrapped(self.note, width)] if self.note else [])])

    def to_latex(self) -> str:
        """The same as ``tabular``, which need the package booktabs."""
        notes = [f"% {self.note}"] if self.note else []
        return "\n".join([*notes, *(line for _, rows, _ in self._parts() for line in [*_latex(rows), ""])])

    def _parts(self) -> list[tuple[str, list[list[str]], int]]:
        """Tables: a title, rows of which the first is the headings, and how many columns name a row."""
        parts = [("", self._scores(), 2)]
        parts += [("Noise floor, from the unpruned model's second answers:", self._aa(), 2)] if self._floors else []
        parts += [("Retained, percent of the unpruned score:", self._shares(), 2)] if self._has_shares else []
        parts += [("Measured time over that of the unpruned model:", self._times(), 3)] if self._is_timed else []
        return parts

    @property
    def _has_shares(self) -> bool:
        return any(line.mean("retained", self.names[:1]) for line in self.lines)

    @property
    def _is_timed(self) -> bool:
        return any(time.n for line in self.lines for cell in line.cells.values() for time in cell.times.values())

    @property
    def _floors(self) -> bool:
        return any(not math.isnan(cell.again.difference) for line in self.lines for cell in line.cells.values())

    def _aa(self) -> list[list[str]]:
        """A line for each way in which rows were asked and computed."""
        texts: dict[tuple[str, str], dict[str, str]] = {}
        for line in self.lines:
            place = f"A/A ({line.where})" if line.where else "A/A", f"first {line.limit}" if line.limit else ""
            for name, cell in line.cells.items():
                if text := floor_text(cell.again, 2):
                    texts.setdefault(place, {})[name] = text
        return [
            ["", "rows", *self.names],
            *([*place, *(of.get(name, MISSING) for name in self.names)] for place, of in texts.items()),
        ]

    def _scores(self) -> list[list[str]]:
        rows = [["method", "ratio", "kept", "layers", *self.names, "retained %"]]
        for line in self.lines:
            kept, layers, retained = (line.mean(field, self.names) for field in ("kept", "layer_mean", "retained"))
            scores = [_score(line.cells.get(name)) for name in self.names]
            rows.append([line.method, line.share, _number(kept, 2), _number(layers, 2), *scores, _number(retained)])
        return rows

    def _shares(self) -> list[list[str]]:
        rows = [["method", "ratio", *self.names, "mean"]]
        for line in self.lines:
            shares = [line.cells[name].retained if name in line.cells else None for name in self.names]
            rows.append([line.method, line.share, *map(_number, shares), _number(line.mean("retained", self.names))])
        return rows

    def _times(self) -> list[list[str]]:
        rows = [["method", "ratio", "time", *self.names]]
        for line in self.lines:
            for stage in STAGES:
                times = [_time(line.cells.get(name), stage) for name in self.names]
                if any(time.n for time in times):
                    rows.append([line.method, line.share, stage.replace("_", " "), *map(_time_text, times)])
        return rows


def tables(
    rows: Iterable[Row],
    planned: Mapping[str, Sequence[str]] | None = None,
    compared: Mapping[tuple[Any, ...], ComparedRow] | None = None,
    note: str = "",
) -> list[Table]:
    """One table per model of a results file, models and variants in the order of the file.

    Args:
        planned: benchmarks of each model, which are columns even where no row is there yet.
        compared: each variant with the unpruned model, by `variant_key`.
        note: for under each table.
    """
    rows, planned = list(rows), planned or {}
    return [
        _table([r for r in rows if r["model"] == model], planned.get(model, ()), compared or {}, note)
        for model in dict.fromkeys(r["model"] for r in rows)
    ]


def write_tables(results: Path, planned: Mapping[str, Sequence[str]] | None = None) -> list[Table]:
    """Write ``<results>/<model>.csv``, ``.md`` and ``.tex`` of `tables` for a results CSV; returns the tables."""
    folder = results.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    compared: dict[tuple[Any, ...], ComparedRow] = {}
    note = "* differs from the unpruned score at 5 % after Holm's correction. ±: standard deviation over seeds."
    try:
        compared = {variant_key(row): row for row in compare(results, select=finished_headline).rows}
    except NotComparable as error:
        note = f"Without marks of significance: {str(error).splitlines()[0]}"
    written = tables(read_results(results), planned, compared, note)
    for table in written:
        for suffix, text in (("csv", table.to_csv()), ("md", table.to_markdown()), ("tex", table.to_latex())):
            with atomic_write(folder / f"{table.model}.{suffix}") as stream:
                stream.write(text)
    return written


def _table(
    rows: Sequence[Row], planned: Sequence[str], compared: Mapping[tuple[Any, ...], ComparedRow], note: str
) -> Table:
    first = {row["benchmark"]: row for row in reversed(rows)}
    metric = {name: benchmarks.headline(row) for name, row in first.items()}
    names = tuple(dict.fromkeys([*planned, *(row["benchmark"] for row in rows)]))
    placed_by = _placed(rows)
    groups: dict[tuple[Any, ...], dict[str, Group]] = {_variant(row, placed_by): {} for row in rows}
    for group in grouped(row for row in rows if row["status"] == "ok" and row["metric"] == metric[row["benchmark"]]):
        groups[_variant(group[0], placed_by)][group[0]["benchmark"]] = group
    lines = []
    for variant, by_benchmark in groups.items():
        method, parameters, ratio, budget, limit, *placed = variant
        unpruned = {tuple(v[5:]): of for v, of in groups.items() if v[0] == BASELINE and v[4] == limit}
        baseline = unpruned.get(tuple(placed)) or next(iter(unpruned.values()), {})
        where = ", ".join(value for value in placed if value and method != AGAIN)
        lines.append(
            Line(
                ("unpruned" if method == BASELINE else _name(rows[0]["model"], method, parameters))
                + (f" ({where})" if where else ""),
                *(ratio, budget, limit),
                max(map(len, by_benchmark.values()), default=1),
                {name: _cell(group, baseline.get(name), compared) for name, group in by_benchmark.items()},
                where,
            )
        )
    random = any(row["trained_weights"] is False for row in rows)
    agreed = [name for name, headline in metric.items() if headline in agreement.METRICS]
    notes = [*(["Random weights: these numbers mean nothing."] if random else []), *([note] if note else [])]
    notes += [f"{', '.join(agreed)}: {agreement.NOTE}."] if agreed else []
    counts: dict[str, set[int]] = {}
    for row in rows:
        if row["status"] == "ok" and row["n_samples"]:
            counts.setdefault(row["benchmark"], set()).add(row["n_samples"])
    sizes = [f"{name} {' or '.join(map(str, sorted(counts[name])))}" for name in names if name in counts]
    notes += [f"Samples: {', '.join(sizes)}; `ivcp compare` has intervals."] if sizes else []
    times = [time for line in lines for cell in line.cells.values() for time in cell.times.values() if time.n]
    notes += [times_note(times)] if times else []
    notes += [FLOOR] if any(not math.isnan(c.again.difference) for line in lines for c in line.cells.values()) else []
    return Table(rows[0]["model"], names, tuple(lines), " ".join(notes))


def _placed(rows: Sequence[Row]) -> list[str]:
    """Columns of `PLACED` by which variants become several lines: data type and kernel where rows differ in them; what
    a cluster may mix or one benchmark alone has, only where one variant was measured twice on a benchmark."""
    own = [row for row in rows if row["method"] != AGAIN and not row["served"]]
    ways: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
    for row in own:
        key = row["benchmark"], row["metric"], *_variant(row, ("dtype", "attention"))
        ways.setdefault(key, set()).add(tuple(row[name] for name in PLACED))
    twice = {name for of in ways.values() for name, values in zip(PLACED, zip(*of, strict=True), strict=True)
             if len({*values}) > 1}  # fmt: skip
    twice |= {name for name in ("dtype", "attention") if len({row[name] for row in own}) > 1}
    return [name for name in PLACED if name in twice]


def _variant(row: Row, placed: Sequence[str]) -> tuple[Any, ...]:
    where = (row[name] for name in placed)
    if row["method"] == BASELINE:
        return BASELINE, None, 1.0, "", row["limit"], *where
    return *(row[name] for name in _VARIANT), *where


def _cell(group: Group, baseline: Group | None, compared: Mapping[tuple[Any, ...], ComparedRow]) -> Cell:
    row = merged(group)
    before = merged(baseline)["score"] if baseline else None
    beside = compared.get(variant_key(row))
    return Cell(
        row["score"],
        stdev(r["score"] for r in group) if len(group) > 1 else None,
        100 * row["score"] / before if before else None,
        None if beside is None or math.isnan(beside.p_holm) else beside.p_holm < 0.05,
        row["ratio_kept_final"],
        row["ratio_layer_mean"],
        beside.times if beside else {},
        beside.noise_floor if beside else _NO_FLOOR,
    )


def _name(model: str, method: str, parameters: str | None) -> str:
    """The method and those of its parameters that are neither its own nor the checkpoint's defaults."""
    from ivcp_eval.interface.models import find
    from ivcp_eval.interface.registry import make_method

    given = json.loads(parameters or "{}")
    try:
        # Through JSON, as the file has them: tuples are lists there, and a wrapped method is a mapping.
        usual = json.loads(json.dumps(dataclasses.asdict(make_method(method))))  # type: ignore[call-overload]
    except ValueError:  # a method that was removed since
        return method
    with contextlib.suppress(ValueError):  # a model that was removed since
        usual |= find(model)[1].methods.get(method, {})
    words = [f"{key}={value}" for key, value in sorted(given.items()) if usual.get(key) != value]
    return f"{method} ({', '.join(words)})" if words else method


def _csv_cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _number(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _score(cell: Cell | None) -> str:
    if cell is None:
        return MISSING
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.1f}"
    return f"{cell.score:.1f}{spread}" + ("*" if cell.significant else "")


def _time(cell: Cell | None, stage: str) -> TimeRatio:
    return (cell.times if cell else {}).get(stage, TimeRatio())


def _time_text(time: TimeRatio) -> str:
    return time_cell(time) or MISSING


def _time_values(cell: Cell | None, stage: str) -> list[float | int | None]:
    """Ratio, interval and number of samples, as the CSV has them: nothing where nothing was measured."""
    time = _time(cell, stage)
    return [None if math.isnan(value) else value for value in (time.ratio, time.low, time.high)] + [time.n or None]


def _floor_values(cell: Cell | None) -> list[float | int | None]:
    again = cell.again if cell else _NO_FLOOR
    return [None if math.isnan(again.difference) else again.difference, again.answers_changed]


def _folded(rows: Sequence[Sequence[str]], names: int, width: int | None) -> str:
    """``rows`` begin with the headings; the first ``names`` columns say which row it is."""
    columns = {head: column for head, *column in zip(*rows, strict=True)}
    return fold(columns, rows[0][:names], width=width)


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(4, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [_bar(row, widths) for row in (rows[0], rule, *rows[1:])]


def _latex(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}", r"\toprule", _ampersands(rows[0])]
    return [*lines, r"\midrule", *map(_ampersands, rows[1:]), r"\bottomrule", r"\end{tabular}"]


def _bar(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(padded) + " |"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"
