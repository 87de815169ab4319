"""The same question in other words: fixed templates, or a user's file.

Templates wrap the question as the data set has it and change no word of it, so they keep its meaning whatever it is;
they are deterministic. What a person would write instead comes from a file.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

QUESTIONS = {
    "about the image": "Here is a question about the image: {question}",
    "please look": "Please look at the image and answer: {question}",
}
#: Of grounding, whose questions are phrases: "red circle", "the man on the left".
PHRASES = {
    "in this image": "{the}{question} in this image",
    "what is described": 'what is described as "{question}"',
}
_DETERMINERS = ("a", "an", "the", "this", "that", "his", "her", "its", "their", "my", "your", "both", "two", "all")


def templates(kind: str | None) -> Mapping[str, str]:
    """Name -> template for questions of a benchmark's kind."""
    return PHRASES if kind == "grounding" else QUESTIONS


def fill(template: str, question: str) -> str:
    """The question in the words of a template."""
    first = question.split(maxsplit=1)[0].lower() if question.strip() else ""
    return template.format(question=question, the="" if first in _DETERMINERS else "the ")


def from_file(path: Path, indices: Sequence[str]) -> dict[str, str]:
    """Index -> question in other words, from a CSV or TSV with the columns ``index`` and ``question``.

    Args:
        indices: which are wanted.

    Raises:
        FileNotFoundError: there is no such file. ValueError: a column, an index or a text is missing, or an index
            occurs twice.
    """
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="," if path.suffix.lower() == ".csv" else "\t")
        if missing := {"index", "question"} - set(reader.fieldnames or ()):
            raise ValueError(
                f"{path} needs the columns index and question (with tabs between them, or a name that ends in .csv); "
                f"missing: {', '.join(sorted(missing))}"
            )
        rows = list(reader)
    texts = {row["index"]: row["question"] for row in rows}
    if len(texts) < len(rows):
        raise ValueError(f"{path}: {len(rows) - len(texts)} index values occur more than once; each needs one question")
    if lacking := [index for index in indices if not (texts.get(index) or "").strip()]:
        raise ValueError(
            f"{path} has no question for {len(lacking)} of {len(indices)} rows that are asked, e.g. index "
            f"{lacking[0]}; add them, or ask fewer rows with --limit"
        )
    return {index: texts[index] for index in indices}
