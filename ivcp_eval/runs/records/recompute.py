"""Makes a cell's ``predictions.csv`` and ``run.json`` from its journal and ``scores.json``, whenever asked."""

from __future__ import annotations

import json
from typing import Any

from ivcp_eval.files import write_json
from ivcp_eval.reports.table import write_samples
from ivcp_eval.runs.answering.timing import times_of
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.records.record import CellRecord, cell_record, sample_rows
from ivcp_eval.runs.records.scores import Scores
from ivcp_eval.runs.store.journal import Journal


def recompute(cell: Cell) -> CellRecord:
    """Make the cell's files again, the record last; a file that would not change is left as it is.

    Raises:
        FileNotFoundError: there is no ``scores.json``. ValueError: it cannot be read.
        DiskFullError: what was there before is untouched.
    """
    scores = Scores.read(cell.scores)
    notes: dict[str, Any] = json.loads(cell.notes.read_text(encoding="utf-8"))
    answers = Journal(cell.journal).load()
    times = times_of(cell) if scores.made.timing else {}
    record = cell_record(notes["identity"], answers, scores, notes["decoder"], times)
    before = json.loads(cell.record.read_text(encoding="utf-8")) if cell.record.is_file() else {}
    fresh = before.get("samples_sha256") == record.samples_sha256 and cell.predictions.is_file()
    if scores.samples and not fresh:
        write_samples(cell.predictions, sample_rows(answers, scores, notes["decoder"], times))
    if record.to_json() != before:
        write_json(cell.record, record.to_json())
    return record
