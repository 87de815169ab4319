"""CSV rows of a cell from its files alone: a plug-in's source is shown, also where it is not installed any more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivcp_eval import benchmarks
from ivcp_eval.interface import models
from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.table import write_results
from ivcp_eval.runs.planning.cells import Cell, Identity
from ivcp_eval.runs.records.recompute import recompute
from ivcp_eval.runs.records.rows import cell_rows
from ivcp_eval.runs.records.scores import Made, Scores

SOURCE = "gone-package 1.2 (code 0123456789ab)"


def identity(method: str, source: str) -> Identity:
    """Of a cell that some other machine made."""
    return Identity(
        variant=Variant("tiny", method, 0.5),
        method_parameters={"layer": 2},
        weights="w",
        benchmark="tiny_short",
        data="0" * 64,
        scoring="1" * 64,
        limit=None,
        prompt="2" * 64,
        judge="none",
        limits={"min_pixels": None, "max_pixels": None, "max_new_tokens": 8},
        placement={"device": "cpu", "dtype": "float32", "attention": "sdpa"},
        versions={"torch": "2", "transformers": "5", "vlmeval": "1"},
        code="3" * 12,
        method_source=source,
    )


def test_rows_of_a_method_that_is_not_installed(tmp_path: Path) -> None:
    cell = Cell(identity("long_gone", SOURCE), tmp_path)
    cell.note()
    Scores(Made(faithfulness="from_formula"), problem="a reason").write(cell.scores)
    recompute(cell)
    family, checkpoint = models.find("tiny")
    weights = models.Weights(checkpoint, family, tmp_path, "w")
    (row,) = cell_rows(weights, benchmarks.load("tiny_short"), cell, tmp_path / "r.csv")
    assert (row["method"], row["method_source"], row["faithfulness"]) == ("long_gone", SOURCE, "from_formula")
    write_results(tmp_path / "r.csv", [row])


@pytest.mark.parametrize("source", ["", SOURCE])
def test_the_source_is_part_of_the_hash_only_where_there_is_one(source: str) -> None:
    made = identity("fastv", source)
    assert ("method_source" in json.loads(made.canonical)) == bool(source)
    assert (made.hash == identity("fastv", "").hash) == (not source)
