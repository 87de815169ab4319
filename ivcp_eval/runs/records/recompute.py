"""Makes a cell's ``predictions.csv`` and ``run.json`` from its journal and ``scores.json``, whenever asked."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.files import DamagedError, damage_as_clear_error, file_digest, write_json
from ivcp_eval.reports.table import write_samples
from ivcp_eval.runs.answering.timing import throughput_of, times_of
from ivcp_eval.runs.planning.cells import NOTES_ADVICE, Cell, read_notes
from ivcp_eval.runs.records.record import CellRecord, cell_record, sample_rows
from ivcp_eval.runs.records.scores import Scores
from ivcp_eval.runs.store.journal import ANSWERED_AGAIN, Journal


def recompute(cell: Cell) -> CellRecord:
    """Make the cell's files again, the record last; a file that would not change is left as it is.

    Raises:
        FileNotFoundError: there is no ``scores.json``. ValueError: it cannot be read.
        DamagedError: answers that were scored are gone, or one of the files is damaged.
        DiskFullError: what was there before is untouched.
    """
    scores = Scores.read(cell.scores)
    notes = read_notes(cell.notes)
    if config := notes.get("text_config"):  # how sizes are read from it may have been mended since
        with damage_as_clear_error(cell.notes, NOTES_ADVICE):
            notes["decoder"] = asdict(DecoderShape.of(config))
        cell.note(notes["decoder"])
    journal = Journal(cell.journal)
    answers = journal.load()
    if lost := sum(sample.key not in answers for sample in scores.samples):
        raise journal.damage or DamagedError(cell.journal, f"{lost} answers are gone", ANSWERED_AGAIN)
    times = times_of(cell)  # also where the run that scored it first did not time
    with damage_as_clear_error(cell.notes, NOTES_ADVICE):  # a decoder of other sizes than the answers'
        rate = throughput_of(cell) if times else None
        record = cell_record(notes["identity"], answers, scores, notes["decoder"], times, rate)
    before: dict[str, Any] = {}
    with suppress(DamagedError):  # it is made here
        before = cell.read_record() or {}
    if scores.samples:
        recorded = before.get("samples_sha256"), before.get("predictions_sha256")
        if recorded != (record.samples_sha256, _digest(cell.predictions)):
            write_samples(cell.predictions, sample_rows(answers, scores, notes["decoder"], times))
        record = replace(record, predictions_sha256=_digest(cell.predictions))
    if record.to_json() != before:
        write_json(cell.record, record.to_json())
    return record


def _digest(path: Path) -> str:
    return file_digest(path) if path.is_file() else ""
