"""Wide tables as papers print them: one per model, variants as rows, benchmarks as columns; CSV, Markdown and LaTeX.

A ratio is the one asked for, with what it is a share of where a budget was held (``0.6 layer_mean``). A cell is the
headline metric and, beside it, what is retained of the unpruned score. The averages stand only where
every benchmark of the row has a score: nothing is averaged over what happens to be there.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivcp_eval import benchmarks
from ivcp_eval.files import as_shown, atomic_write
from ivcp_eval.interface.variants import BASELINE

Row = Mapping[str, Any]
MISSING = "-"
_LATEX = str.maketrans(
    {c: "\\" + c for c in "%_&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
)


@dataclass(frozen=True)
class Table:
    """One model's table as text cells.

    Attributes:
        model: short name. header, rows: cells. note: what holds for the whole table.
    """

    model: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def to_csv(self) -> str:
        """Comma-separated, header first."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(
            [[as_shown(cell) for cell in row] for row in (self.header, *self.rows)]
        )
        return stream.getvalue()

    def to_markdown(self) -> str:
        """A Markdown table under the model's name, aligned also as plain text."""
        rows = [[cell.replace("|", r"\|") for cell in row] for row in (self.header, *self.rows)]
        widths = [max(4, *map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        lines = [f"### {self.model}", "", *(_bar(row, widths) for row in rows)]
        return "\n".join([*lines, "", self.note, ""] if self.note else [*lines, ""])

    def to_latex(self) -> str:
        """A ``tabular`` that needs the package booktabs."""
        lines = [r"\begin{tabular}{l" + "r" * (len(self.header) - 1) + "}", r"\toprule", _ampersands(self.header)]
        lines += [r"\midrule", *[_ampersands(row) for row in self.rows], r"\bottomrule", r"\end{tabular}"]
        return "\n".join([*([f"% {self.note}"] if self.note else []), *lines, ""])


def tables(rows: Iterable[Row], planned: Mapping[str, Sequence[str]] | None = None) -> list[Table]:
    """One table per model of a results file, models and variants in the order of the file.

    Args:
        planned: benchmarks of each model, which are columns even where no row is there yet.
    """
    rows, planned = list(rows), planned or {}
    return [
        _table(model, [r for r in rows if r["model"] == model], planned.get(model, ()))
        for model in dict.fromkeys(r["model"] for r in rows)
    ]


def write_tables(rows: Iterable[Row], folder: Path, planned: Mapping[str, Sequence[str]] | None = None) -> list[Path]:
    """Write ``<folder>/<model>.csv``, ``.md`` and ``.tex`` of `tables`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables(rows, planned):
        for suffix, text in (("csv", table.to_csv()), ("md", table.to_markdown()), ("tex", table.to_latex())):
            path = folder / f"{table.model}.{suffix}"
            with atomic_write(path) as stream:
                stream.write(text)
            written.append(path)
    return written


def _table(model: str, rows: Sequence[Row], planned: Sequence[str]) -> Table:
    measured = dict.fromkeys(row["benchmark"] for row in rows)
    names = list(dict.fromkeys([*planned, *measured]))
    headline = {name: _headline(name, [row for row in rows if row["benchmark"] == name]) for name in measured}
    scores: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        variant = _variant(row)
        scores.setdefault(variant, {})
        if row["status"] == "ok" and row["metric"] == headline[row["benchmark"]]:
            scores[variant][row["benchmark"]] = row["score"]
    baseline = next((found for variant, found in scores.items() if variant[0] == BASELINE), {})
    lines = [_line(variant, found, baseline, names) for variant, found in scores.items()]
    random = any(row["trained_weights"] is False for row in rows)
    note = "Random weights: these numbers mean nothing." if random else ""
    return Table(model, ("method", "ratio", *names, "retained"), tuple(lines), note)


def _headline(benchmark: str, rows: Sequence[Row]) -> str:
    if benchmark in benchmarks.names() and benchmarks.load(benchmark).metrics:
        return benchmarks.load(benchmark).metrics[0].name
    return str(rows[0]["metric"])


def _variant(row: Row) -> tuple[Any, ...]:
    if row["method"] == BASELINE:
        return (BASELINE,)
    return row["method"], row["ratio_asked"], row["method_parameters"], row["seed"], row["budget"]


def _line(
    variant: tuple[Any, ...], scores: Mapping[str, float], baseline: Mapping[str, float], names: Sequence[str]
) -> tuple[str, ...]:
    shares = {n: scores[n] / baseline[n] for n in names if n in scores and baseline.get(n)}
    cells = []
    for name in names:
        if name not in scores:
            cells.append(MISSING)
        elif variant[0] == BASELINE or name not in shares:
            cells.append(f"{scores[name]:.1f}")
        else:
            cells.append(f"{scores[name]:.1f} ({100 * shares[name]:.1f}%)")
    whole = len(shares) == len(names)
    mean = f"{100 * sum(shares.values()) / len(names):.1f}%" if whole else MISSING
    return _name(variant), "1" if len(variant) == 1 else f"{variant[1]:g} {variant[4]}".rstrip(), *cells, mean


def _name(variant: tuple[Any, ...]) -> str:
    """The method and those of its parameters that are not its defaults."""
    from ivcp_eval.interface.registry import make_method

    if len(variant) == 1:
        return "unpruned"
    method, _, parameters, seed = variant[:4]
    try:
        # Through JSON, as the file has them: tuples are lists there, and a wrapped method is a mapping.
        defaults = json.loads(json.dumps(dataclasses.asdict(make_method(method))))  # type: ignore[call-overload]
        extra = {k: v for k, v in json.loads(parameters or "{}").items() if defaults.get(k) != v}
    except ValueError:  # a method that was removed since
        extra = {}
    words = [f"{key}={value}" for key, value in sorted(extra.items())] + ([f"seed={seed}"] if seed else [])
    return f"{method} ({', '.join(words)})" if words else str(method)


def _bar(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(padded) + " |"


def _ampersands(cells: Sequence[str]) -> str:
    return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"
