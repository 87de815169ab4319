"""Answers that are lists: the share in order by trying every subsequence, and what the data set's evaluator leaves."""

from __future__ import annotations

import itertools
import random

import pytest

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks.lists import in_order, items
from tests.vlmeval_bridge.conftest import Laboratory
from tests.vlmeval_bridge.files import Files, files

__all__ = ["files"]
LIST = "kind: list\nprompt: dataset\nmetrics: [{name: in_order, file: _acc.csv, column: in_order}]\n"
LIST += "samples: {file: _results.csv, column: in_order}\n"


def test_items() -> None:
    assert items(" Red circle,blue star.\n SIGN , ,") == ["red circle", "blue star", "sign"]
    assert items("") == items(" ., \n") == []


def slow(said: list[str], wanted: list[str]) -> float:
    for k in range(min(len(said), len(wanted)), 0, -1):
        if {*itertools.combinations(said, k)} & {*itertools.combinations(wanted, k)}:
            return k / max(len(said), len(wanted))
    return 0.0


def test_share_in_order() -> None:
    draw = random.Random(0)
    seen = set()
    for _ in range(300):
        said, wanted = (draw.choices("abcd", k=draw.randint(1, 6)) for _ in range(2))
        share = in_order(", ".join(said), "\n".join(wanted))
        assert share == pytest.approx(slow(said, wanted))
        seen.add(share)
    assert {0.0, 1.0} < seen
    assert in_order("", "a") == in_order("No", "a, b") == 0


def test_the_evaluator(laboratory: Laboratory, files: Files) -> None:
    rows = [
        {"index": 1, "question": "Name them.", "answer": "red circle, sign", "category": "order"},
        {"index": 2, "question": "Name them.", "answer": "a, b, c, d", "category": "order"},
        {"index": 3, "question": "Add up.", "answer": "2 red makes 2, 1 blue makes 3", "category": "sum"},
    ]
    benchmark = files.put("lists", rows, LIST)
    assert benchmark.kind == "list"
    assert files.prompts(laboratory, benchmark) == ["Name them.", "Name them.", "Add up."]
    given = {"1": "Red circle, sign.", "2": "b, a, c", "3": "No"}
    scored = files.score(benchmark, given)
    assert scored.metrics["in_order"][0] == pytest.approx(100 * (1 + 2 / 4 + 0) / 3)
    assert [scored.samples[index] for index in "123"] == [1, 0.5, 0]


def test_the_embedded_lists_are_not_among_what_is_run_by_default() -> None:
    assert "tiny_list" in benchmarks.names()
    assert "tiny_list" not in benchmarks.names("embedded")
