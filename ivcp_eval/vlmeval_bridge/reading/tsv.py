"""Reads benchmark TSV files: every cell as the text it is, and nothing that VLMEvalKit would run or write elsewhere.

VLMEvalKit calls ``eval`` on index cells, on bracketed ``image`` and ``image_path`` cells and, in its evaluators, on
answers; it names the pictures it unpacks after ``image_path`` or ``index``. So no file reaches it that was not read
here first: what evaluates to more than a constant, and what names a file outside the picture folder, is refused.
"""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import csv
import hashlib
import io
import posixpath
import re
import string
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd

from ivcp_eval.files import long_cells, remembered
from ivcp_eval.vlmeval_bridge.environment import wrong_checksum

#: VLMEvalKit takes an image cell of up to this many characters for a reference to another row.
REFERENCE = 64
#: Columns whose cells people read; they stay text also where VLMEvalKit would make numbers of them.
PROSE = frozenset({"question", "hint", "prompt", *string.ascii_uppercase})
TEXT = PROSE | {"index", "image", "image_path", "answer", "category", "l2-category", "split"}

#: Bytes of a name that file systems take, with room for the endings that VLMEvalKit adds.
LONGEST_NAME = 200

_PLAIN_INDEX = re.compile(r"[\w.\- ]+")
_OPERATOR = re.compile(r"[(*%{]|<<")
_HARMLESS = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.UAdd, ast.USub, ast.BinOp),
    *(ast.Add, ast.Sub, ast.Div, ast.Tuple, ast.List, ast.Dict, ast.Set),
)


class BadTable(ValueError):
    """A TSV file that cannot be used; the message names the file, the row, the column, and what is allowed."""


def read(path: Path, md5: str = "") -> pd.DataFrame:
    """The table, read once; every cell text, an empty one ``""``.

    Args:
        md5: checksum that the file must have; "" takes any.

    Raises:
        WrongChecksum: it has another one. BadTable: not a TSV file, or cells that VLMEvalKit must not get.
    """
    with path.open("rb") as stream:
        watched = _Watched(stream, path, bool(md5))
        with _as_bad_table(path):
            table = pd.read_csv(watched, sep="\t", dtype=str, keep_default_na=False)
        watched.drain()
    if md5 and watched.md5.hexdigest() != md5:
        raise WrongChecksum(path, watched.md5.hexdigest(), md5)
    _check_shape(path, table)
    table = _checked(path, table)
    if not md5:  # a file of VLMEvalKit's is as its authors meant it
        remembered(path, "quotes", _check_quotes, bool)  # a second reading of the whole file
        _check_files(path, table)
    return table


def columns(path: Path) -> list[str]:
    """Names in the header. Raises BadTable: not a TSV file."""
    with _as_bad_table(path):
        return [str(name) for name in pd.read_csv(path, sep="\t", nrows=0).columns]


@contextmanager
def _as_bad_table(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadTable(
            f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8 text; save the file as UTF-8"
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise BadTable(f"{path}: {_explained(str(error))}") from error


class WrongChecksum(BadTable):
    """A file of VLMEvalKit's name that is not VLMEvalKit's file. It is left as it is: VLMEvalKit would replace it."""

    def __init__(self, path: Path, got: str, expected: str) -> None:
        super().__init__(wrong_checksum(path, got, expected))


class _Watched(io.RawIOBase):
    """A binary file that is hashed while it is read, if asked, and must not hold NUL bytes."""

    def __init__(self, stream: IO[bytes], path: Path, hashed: bool) -> None:
        self.stream, self.path, self.hashed, self.position = stream, path, hashed, 0
        self.md5 = hashlib.md5(usedforsecurity=False)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        if self.hashed:
            self.md5.update(data)
        if b"\0" in data:
            raise BadTable(
                f"{self.path}: a NUL byte at position {self.position + data.index(0)}; the file is damaged, or UTF-16: "
                "get it again, or save it as UTF-8"
            )
        self.position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def drain(self) -> None:
        while self.read(1 << 20):
            pass


def _explained(problem: str) -> str:
    if "EOF inside string" in problem:
        return (
            f"a cell begins with a quotation mark that is never closed ({problem.strip()}); write it twice or remove it"
        )
    if "No columns" in problem:
        return "the file is empty"
    return f"not a TSV file ({problem.strip()})"


def _check_quotes(path: Path) -> bool:
    """True; raises BadTable for a quotation mark that is text and was read as one around a cell: others move."""
    with path.open(encoding="utf-8", newline="") as stream, long_cells():
        reader, width = csv.reader(stream, delimiter="\t", strict=True), 0
        try:
            for row, cells in enumerate(reader):
                width = width or len(cells)
                if len(cells) < width and any("\t" in cell for cell in cells):
                    raise BadTable(
                        f"{path}, row {row}: a cell that begins with a quotation mark holds the cells after it, and "
                        f"{width - len(cells)} are missing at the end; write the mark twice or remove it"
                    )
        except csv.Error as error:
            raise BadTable(
                f"{path}, line {reader.line_num}: a cell begins with a quotation mark and goes on behind the closing "
                f"one ({error}); write the marks twice, and a mark around the whole cell"
            ) from None
    return True


def _check_shape(path: Path, table: pd.DataFrame) -> None:
    if not isinstance(table.index, pd.RangeIndex):
        raise BadTable(f"{path}: its rows have more cells than its header has names")
    n = len(table.columns)
    for column in table:
        for row, cell in enumerate(table[column], 1):
            if "\n" in cell and n > 1 and cell.count("\t") >= n - 1:
                raise BadTable(
                    f"{path}, row {row}, column {column}: the cell holds whole rows: its quotation mark "
                    f"is closed too late: {cell[:60]!r}; write the mark twice or remove it"
                )


def _checked(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table with tiny pictures made long enough for VLMEvalKit; raises `BadTable`."""
    known: set[str] = set()
    for row, index in enumerate(table.get("index", ()), 1):
        problem = _bad_index(index)
        if problem:
            raise BadTable(f"{path}, row {row}, column index: {problem}, got {index[:80]!r}")
        known.add(index)
    if "image" in table:
        table["image"] = [_image_cell(path, row, cell, known) for row, cell in enumerate(table["image"], 1)]
    if "image_path" in table:
        for row, cell in enumerate(table["image_path"], 1):
            for name in _members(path, row, "image_path", cell):
                if "image" in table:
                    _check_name(path, row, name)
    for column in table.columns.difference([*PROSE, "index", "image", "image_path"]):
        for row, cell in enumerate(table[column], 1):
            if _OPERATOR.search(cell) and _acts(cell):
                raise BadTable(
                    f"{path}, row {row}, column {column}: VLMEvalKit would run the cell as code: {cell[:80]!r}; only "
                    "text, numbers and lists of them are allowed"
                )
    return table


def _bad_index(index: str) -> str:
    if not index.strip():
        return "every row needs an index"
    if "/" in index or "\\" in index:
        return "an index names the file of its picture and must not hold / or \\"
    if index.strip(".") == "" or len(index.encode()) > LONGEST_NAME:
        return f"an index names the file of its picture: 1 to {LONGEST_NAME} bytes, and not dots alone"
    if not index.isprintable():
        return "an index must not hold control characters"
    if _PLAIN_INDEX.fullmatch(index) is None and _evaluates(index):
        return "VLMEvalKit would evaluate it; letters, digits, dots, - and _ are safe"
    return ""


def _evaluates(text: str) -> bool:
    """Whether ``eval`` would do more than name or add constants."""
    tree = _parsed(text)
    return tree is not None and not all(isinstance(node, _HARMLESS) for node in ast.walk(tree))


def _acts(text: str) -> bool:
    """Whether ``eval`` could do harm: call something, or grow a number or text without bound.

    Of calls only those of unknown names on names and numbers pass (``sin(x)``). Among VLMEvalKit's own names are some
    that run commands and unpickle files, but to harm they need a text.
    """
    tree = _parsed(text)
    nodes = list(ast.walk(tree)) if tree else []
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    texts = any(isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) for node in nodes)
    known = any(not isinstance(f, ast.Name) or hasattr(builtins, f.id) for f in calls)
    return known or bool(calls and texts) or any(_grows(node) for node in nodes)


def _grows(node: ast.AST) -> bool:
    """Whether an operation makes something huge of constants: 9**9**9, 1 << 10**9, "a" * 10**9, "%999999999d" % 1."""
    if isinstance(node, ast.FormattedValue) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod)):
        return any(isinstance(part, ast.Constant) and isinstance(part.value, str | bytes) for part in ast.walk(node))
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Pow | ast.LShift | ast.Mult):
        return False
    inside = list(ast.walk(node))
    if any(isinstance(part, ast.Name) for part in inside):
        return False  # which does not exist
    if isinstance(node.op, ast.Mult):
        sequence = (ast.List, ast.Tuple, ast.JoinedStr)
        return any(isinstance(side, sequence) or isinstance(getattr(side, "value", 0), str | bytes)
                   for side in (node.left, node.right))  # fmt: skip
    largest = max((abs(part.value) for part in inside if isinstance(part, ast.Constant)
                   and isinstance(part.value, int | float)), default=0)  # fmt: skip
    powers = sum(isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow | ast.LShift) for part in inside)
    return powers > 1 or largest > 1000


def _parsed(text: str) -> ast.AST | None:
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None  # which `eval` would not get through either


def _members(path: Path, row: int, column: str, cell: str) -> list[str]:
    """The texts of a cell: itself, or those of a list in brackets; VLMEvalKit evaluates what is in brackets."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell] if cell else []
    try:
        members = ast.literal_eval(cell)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        members = None
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise BadTable(
            f"{path}, row {row}, column {column}: what stands in brackets must be a list of quoted texts, "
            f"got {cell[:80]!r}"
        )
    return members


def _check_name(path: Path, row: int, name: str) -> None:
    parts = re.split(r"[/\\]", name)
    if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:", name) or not name.isprintable():
        raise BadTable(
            f"{path}, row {row}, column image_path: pictures are unpacked below the data set's picture folder, so the "
            f"path must be relative and without .., got {name[:80]!r}"
        )
    if parts[-1].strip(".") == "" or any(len(part.encode()) > LONGEST_NAME for part in parts):
        raise BadTable(
            f"{path}, row {row}, column image_path: a file name of 1 to {LONGEST_NAME} bytes is expected, "
            f"got {name[:80]!r}"
        )


def _check_files(path: Path, table: pd.DataFrame) -> None:
    """Raise BadTable if two rows name one file for different pictures: VLMEvalKit would show both the first."""
    if not {"index", "image"} <= set(table):
        return
    cells = dict(zip(table["index"], table["image"], strict=True))
    there: dict[str, tuple[str, str]] = {}
    for row, (index, cell) in enumerate(zip(table["index"], table["image"], strict=True), 1):
        pictures = _members(path, row, "image", cells.get(cell, cell))
        names = [f"{index}.png"] if len(pictures) == 1 else [f"{index}_{i}.png" for i in range(len(pictures))]
        if "image_path" in table and table["image_path"].iloc[row - 1]:
            names = _members(path, row, "image_path", table["image_path"].iloc[row - 1])
        for name, picture in zip(map(posixpath.normpath, names), pictures, strict=False):
            other, shown = there.setdefault(name, (index, picture))
            if shown != picture:
                raise BadTable(
                    f"{path}: the rows with index {other!r} and {index!r} name the same file for different pictures, "
                    f"{name!r}; the second would be answered about the first. Give each picture a name of its own"
                )


def _image_cell(path: Path, row: int, cell: str, known: Iterable[str]) -> str:
    if len(cell) > REFERENCE or cell == "":
        _members(path, row, "image", cell)
        return cell
    if cell in known:
        return cell
    members = [_enlarged(member) for member in _members(path, row, "image", cell)]
    if not all(members):
        raise BadTable(
            f"{path}, row {row}, column image: {cell!r} is neither a picture nor the index of a row that holds one"
        )
    return str(members) if cell.startswith("[") else members[0]


def _enlarged(cell: str) -> str:
    """A tiny picture (a GIF of one pixel, say) as a PNG, whose text is too long for a reference; "" if it is none."""
    from ivcp_eval.benchmarks.pictures import decoded

    try:
        picture = decoded(io.BytesIO(base64.b64decode(cell, validate=True)))
    except (binascii.Error, OSError):
        return ""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def typed(table: pd.DataFrame, text: Iterable[str]) -> pd.DataFrame:
    """As VLMEvalKit's own reader gives it, without what that loses: empty cells are NaN, words never are.

    Args:
        text: columns that stay text; in the others numbers and booleans become what they are.
    """
    kept = set(text)
    return pd.DataFrame({column: _typed(table[column], column in kept) for column in table}, index=table.index)


def _typed(cells: pd.Series, text: bool) -> pd.Series:
    cells = cells.astype(object).where(cells != "", other=float("nan"))
    there = cells.dropna()
    if text or there.empty:
        return cells
    if there.isin(["True", "False"]).all() and len(there) == len(cells):
        return cells == "True"
    try:
        return pd.to_numeric(cells)
    except (ValueError, TypeError):
        return cells
