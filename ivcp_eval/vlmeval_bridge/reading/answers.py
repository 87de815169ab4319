"""The prediction file that goes to an evaluator: answers and columns arrive as the text they are.

VLMEvalKit reads a TSV with pandas' defaults: an empty answer becomes "nan", "None" and "NA" become missing, and "2"
becomes "2.0" where one answer of the column is empty or a fraction. It reads a pickled table as it is, so that is what
it gets. No answer is put in words of its own, which nothing can match: the empty text is found in every text, and
"a" is nothing to an evaluator that drops articles.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from pandas._libs.parsers import STR_NA_VALUES

from ivcp_eval.benchmarks import thinking
from ivcp_eval.vlmeval_bridge.reading import tsv

#: Stands for an answer that is empty or failed: a character that no alphabet has.
NO_ANSWER = "\ue000"

_GROUPS = ("category", "l2-category")
_TOTALS = ("overall", "split")  # columns of the evaluators' tables, which a category of that name would overwrite


def write(table: pd.DataFrame, path: Path) -> Path:
    """Write what an evaluator reads; returns ``path`` with the suffix that it got.

    Args:
        table: rows of a data set with a column ``prediction``; pictures are left out. path: without suffix.
    """
    given = table.drop(columns="image", errors="ignore").reset_index(drop=True)
    given["prediction"] = pd.Series(
        [NO_ANSWER if is_empty(text) else str(text) for text in given["prediction"]], index=given.index, dtype=object
    )
    for column in [name for name in _GROUPS if name in given]:
        given[column] = pd.Series(_group_names(given[column]), index=given.index, dtype=object)
    target = path.with_name(f"{path.name}.pkl")
    given.to_pickle(target)
    return target


def read(path: Path) -> pd.DataFrame:
    """The table that `write` wrote."""
    table = pd.read_pickle(path)
    assert isinstance(table, pd.DataFrame)
    return table


def as_text(path: Path) -> Path:
    """The table that `write` wrote as a TSV, for evaluators that read nothing else.

    An answer that pandas would take for a missing value gets a space behind it, which no evaluator minds.
    """
    table = read(path)
    table["prediction"] = [f"{text} " if text in STR_NA_VALUES else text for text in table["prediction"]]
    target = path.with_suffix(".tsv")
    table.to_csv(target, sep="\t", index=False)
    return target


def pickled(path: Path) -> Path:
    """A prediction file as `write` leaves it; one that VLMEvalKit's own runner wrote is read as text and written so."""
    if path.suffix == ".pkl":
        return path
    if path.suffix == ".xlsx":
        table = pd.read_excel(path, dtype=str, keep_default_na=False)
    else:
        table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
    absent = [str(column) for column in table if column in (*string.ascii_uppercase, "hint")]
    table[absent] = tsv.typed(table[absent], absent)
    return write(table, path.with_suffix(""))


def split_thinking(path: Path) -> int:
    """Leave what thinking models answer as the predictions of a file that `write` wrote; how many rows had some."""
    table = read(path)
    thought = int(table["prediction"].str.contains(thinking.END, regex=False).sum())
    if thought:
        table["prediction"], table["thinking"] = zip(*map(thinking.split_thinking, table["prediction"]), strict=True)
        write(table, path.with_suffix(""))
    return thought


def is_empty(answer: Any) -> bool:
    """Whether there is no answer: empty, blank, missing, or what stands for that."""
    return pd.isna(answer) or str(answer).strip() in ("", NO_ANSWER)


def _group_names(cells: Iterable[Any]) -> list[Any]:
    """Categories under names that survive the evaluators' own files and do not meet their totals."""
    named = []
    for cell in cells:
        text = "" if pd.isna(cell) else str(cell)
        taken = text.lower() in _TOTALS or text in STR_NA_VALUES or not text.strip()
        named.append(f"{text or 'no'} (category)" if taken else cell)
    return named
