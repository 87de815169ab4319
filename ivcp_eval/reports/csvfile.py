"""Reading and writing a CSV file by a schema: whole files only, and errors that name the place.

Through `table.py`, which knows what a row means.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from ivcp_eval.files import as_read, as_shown, atomic_write, long_cells
from ivcp_eval.interface.registry import nearest
from ivcp_eval.reports.schema import Column

__all__ = [
    "ResultsError",
    "Row",
    "check_problems",
    "checked",
    "header_of",
    "known",
    "read_columns",
    "read_csv",
    "write_csv",
]

Row = dict[str, Any]
"""Column name -> value. Missing: ``""`` for text, ``None`` for everything else."""


class ResultsError(ValueError):
    """A results file or row that breaks the schema; the message names the file, the place and what is allowed."""


def known(values: Iterable[str], names: Sequence[str], what: str) -> None:
    """Raise ResultsError, with the nearest name, for a value that is no column."""
    for name in values:
        if name not in names:
            raise ResultsError(f"{what} has no column {name!r}{nearest(name, names)}")


def checked(values: Mapping[str, Any], columns: Sequence[Column]) -> Row:
    """Every column's value as it will be read back. Raises ResultsError for a bad one."""
    row: Row = {}
    for column in columns:
        try:
            row[column.name] = column.parse(column.cell(values.get(column.name)))
        except (ValueError, TypeError, OverflowError) as error:
            raise ResultsError(f"column {column.name!r}: {error}") from None
    return row


def write_csv(path: Path, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Write checked rows atomically; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(_line([column.name for column in columns]))
        stream.writelines(_line([_shown(column, row[column.name]) for column in columns]) for row in rows)


def read_csv(path: Path, columns: Sequence[Column]) -> list[tuple[int, Row]]:
    """Rows with their line numbers; late columns that the file lacks are empty.

    Raises:
        FileNotFoundError: there is no such file.
        ResultsError: no CSV file, unknown or missing columns (all but late ones are needed), or bad values.
    """
    rows: list[tuple[int, Row]] = []
    problems: list[str] = []
    by_name = {column.name: column for column in columns}
    with _lines(path, columns) as (header, lines):
        for number, cells in lines:
            row, bad = _parsed(header, cells, by_name)
            problems += [f"line {number}: {problem}" for problem in bad]
            rows.append((number, row))
    check_problems(path, problems)
    return rows


def read_columns(
    path: Path, columns: Sequence[Column], names: Sequence[str], known: dict[str, dict[str, Any]] | None = None
) -> dict[str, list[Any]]:
    """Two columns or more of a CSV file: the values that `read_csv` gives, several times as fast.

    Cells of other columns are not looked at. Raises as `read_csv`.

    Args:
        known: column -> cell -> value of the file of these columns that was read before, and of this one afterwards:
            what both hold is not read and kept twice.
    """
    known = {} if known is None else known
    by_name = {column.name: column for column in columns}
    with _lines(path, columns) as (header, lines):
        there = [name for name in names if name in header]
        chosen = itemgetter(*(header.index(name) for name in there))
        numbers, rows, problems = [], [], []
        for number, cells in lines:
            if len(cells) != len(header):
                problems.append(f"line {number}: {_wrong_length(header, cells)}")
            else:
                numbers.append(number)
                rows.append(chosen(cells))
    cells_of: dict[str, list[Any]] = {}
    for name, texts in zip(there, zip(*rows, strict=True) if rows else [()] * len(there), strict=True):
        values: dict[str, Any] = {}
        before = known.get(name, {})
        for text in dict.fromkeys(texts):  # most columns hold few different cells
            try:
                values[text] = before[text] if text in before else _value(by_name[name], text)
            except ValueError as error:
                problems.append(f"line {numbers[texts.index(text)]}: column {name!r}: {error}")
        cells_of[name] = [values.get(text) for text in texts]
        known[name] = values
    check_problems(path, problems)
    return {name: cells_of.get(name, ["" if by_name[name].kind == "text" else None] * len(rows)) for name in names}


@contextmanager
def _lines(path: Path, columns: Sequence[Column]) -> Iterator[tuple[list[str], Iterator[tuple[int, list[str]]]]]:
    """The checked header, and every line that is not empty with its number; ResultsError for what is no CSV."""
    # utf-8-sig: spreadsheet programs put a byte order mark in front.
    with path.open(encoding="utf-8-sig", newline="") as stream, long_cells():
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            _check_header(path, header, columns)
            yield header, ((reader.line_num, cells) for cells in reader if cells)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ResultsError(f"{path}, line {reader.line_num}: not a UTF-8 CSV file: {error}") from None


def check_problems(path: Path, problems: Sequence[str]) -> None:
    """Raise ResultsError with the first ten problems of a file, if it has any."""
    if problems:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ResultsError(f"{path} breaks the schema (see results/README.md):\n  " + "\n  ".join(problems[:10]) + more)


def header_of(path: Path) -> list[str]:
    """Column names of a CSV file.

    Raises:
        FileNotFoundError: there is no such file. ResultsError: it is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no results file {path}; `ivcp eval` writes results/eval/<model>.csv")
    if not path.stat().st_size:
        raise ResultsError(f"{path} is empty; results begin with a line of column names (results/README.md)")
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as stream:
        return next(csv.reader([stream.readline()]), [])


def _shown(column: Column, value: Any) -> str:
    cell = column.cell(value)
    return as_shown(cell) if column.kind == "text" else cell


def _line(cells: Sequence[str]) -> str:
    # The csv module quotes a lone "\r" only if it is part of the line terminator (before Python 3.13).
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _check_header(path: Path, header: Sequence[str], columns: Sequence[Column]) -> None:
    names = [column.name for column in columns]
    missing = [column.name for column in columns if column.name not in header and not column.late]
    unknown = [name for name in header if name not in names]
    if missing:
        said = "; ".join(f"{name!r}{nearest(name, unknown).removesuffix('.')}" for name in missing)
        raise ResultsError(f"{path} lacks the column(s) {said}. The schema is in results/README.md.")
    if unknown:
        said = "; ".join(f"{name!r}{nearest(name, names).removesuffix('.')}" for name in unknown)
        raise ResultsError(f"{path} has unknown column(s) {said}. The schema is in results/README.md.")
    if len(set(header)) != len(header):
        raise ResultsError(f"{path} names a column twice: {', '.join(header)}")


def _wrong_length(header: Sequence[str], cells: Sequence[str]) -> str:
    return f"{len(cells)} cells, but the header has {len(header)}"


def _value(column: Column, text: str) -> Any:
    return column.parse(as_read(text) if column.kind == "text" else text)


def _parsed(header: Sequence[str], cells: Sequence[str], columns: Mapping[str, Column]) -> tuple[Row, list[str]]:
    if len(cells) != len(header):
        return {}, [_wrong_length(header, cells)]
    row: Row = {}
    problems = []
    for name, text in zip(header, cells, strict=True):
        try:
            row[name] = _value(columns[name], text)
        except ValueError as error:
            problems.append(f"column {name!r}: {error}")
    return {name: row.get(name, "" if column.kind == "text" else None) for name, column in columns.items()}, problems
