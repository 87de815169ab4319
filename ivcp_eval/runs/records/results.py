"""The CSV and the wide tables of a sweep, from its answers and scores: no weights, no data, no GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ivcp_eval import benchmarks
from ivcp_eval.files import DamagedError, damage_as_clear_error
from ivcp_eval.interface import Checkpoint
from ivcp_eval.interface.models import Weights
from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.table import Row, update_results, write_results
from ivcp_eval.reports.wide import Table, write_tables
from ivcp_eval.runs.planning import cells
from ivcp_eval.runs.planning.cells import NOTES_ADVICE, Cell, Identity, read_notes
from ivcp_eval.runs.planning.finished import csv_of
from ivcp_eval.runs.records.recompute import recompute
from ivcp_eval.runs.records.rows import cell_rows
from ivcp_eval.runs.store import manifest


@dataclasses.dataclass(frozen=True)
class Built:
    """What was written.

    Attributes:
        csv: one row per cell and metric. tables: wide tables. missing: cells without a record. unfinished: cells whose
            record says why they have no score. skipped: cells whose method their model cannot run, with the reason.
        unscored: cells of an earlier version, which kept no scores; they are among the missing.
        damaged: what is said of damaged files; their cells are among the missing.
    """

    csv: Path
    tables: list[Table]
    missing: int
    unfinished: list[str]
    skipped: list[str]
    unscored: int = 0
    damaged: tuple[str, ...] = ()


def build(name: str, runs: Path | None = None, output: Path | None = None) -> Built:
    """Write ``results/<name>.csv`` and its tables from the manifest that a run of the sweep left.

    Every cell's record is made again from its answers and scores (`recompute`), so what is corrected there shows.

    Raises:
        FileNotFoundError: the sweep has never run with these ``runs``.
    """
    runs = runs or cells.RUNS
    csv = output or runs.parent / f"{name}.csv"
    collected = collect(runs.parent / "sweeps" / name, runs, csv)
    csv.parent.mkdir(parents=True, exist_ok=True)
    write_results(csv, collected.rows)
    tables = write_tables(csv, collected.planned) if collected.rows else []
    return Built(
        csv,
        tables,
        collected.missing,
        collected.reasons("failed", "incomplete"),
        collected.reasons("skipped"),
        collected.unscored,
        tuple(collected.damaged),
    )


def rebuild_evaluation(state: Path, runs: Path) -> tuple[Path, Collected]:
    """Make the records of one `ivcp eval` again and merge its rows into its results file; see `build`.

    Raises:
        FileNotFoundError, DamagedError: its manifest is not there, or damaged. ResultsError: its results file is.
    """
    (model,) = manifest.read(state)["models"]
    csv = csv_of(state, runs, model)
    collected = collect(state, runs, csv)
    if collected.rows:
        update_results(csv, collected.rows)
    return csv, collected


@dataclasses.dataclass(frozen=True)
class Collected:
    """The rows of a run.

    Attributes:
        rows: of the CSV, in the order of the plan. planned: model -> benchmarks. missing: cells without a record.
        unscored: those of them that an earlier version left, which kept no scores. damaged: what is said of cells
            whose files are damaged; they are among the missing, and the next run mends them.
    """

    rows: list[Row]
    planned: dict[str, list[str]]
    missing: int = 0
    unscored: int = 0
    damaged: list[str] = dataclasses.field(default_factory=list)

    def reasons(self, *statuses: str) -> list[str]:
        """Why cells are not whole, one line each."""
        return list(dict.fromkeys(_reason(row) for row in self.rows if row["status"] in statuses))


def collect(state: Path, runs: Path, csv: Path) -> Collected:
    """The rows of every cell of a run, from its manifest and records.

    Args:
        csv: where they will stand; paths of per-sample files are relative to it.

    Raises:
        FileNotFoundError: the run was never started.
    """
    recorded = manifest.read(state)
    collected = Collected([], {})
    missing = unscored = 0
    for entry in recorded["cells"]:
        folder = runs / entry["folder"]
        collected.planned.setdefault(entry["model"], []).append(folder.parent.name)  # its benchmark (`Cell.folder`)
        if not (folder / "scores.json").is_file():
            missing += 1
            unscored += (folder / "run.json").is_file()
        else:
            try:
                collected.rows.extend(_rows(folder, runs, recorded["models"][entry["model"]], csv))
            except (DamagedError, FileNotFoundError) as error:
                collected.damaged.append(str(error))
                missing += 1
                (folder / "run.json").unlink(missing_ok=True)  # it is not whole any more
    return dataclasses.replace(collected, missing=missing, unscored=unscored)


def _reason(row: Row) -> str:
    variant = f"{row['method']} {row['budget'] or 'r'}{row['ratio_asked']:g}"
    return f"{row['model']} {variant} on {row['benchmark']}: {row['reason']}"


def _rows(folder: Path, runs: Path, model: dict[str, Any], csv: Path) -> list[Row]:
    notes = folder / "cell.json"
    with damage_as_clear_error(notes, NOTES_ADVICE):
        identity = _identity(read_notes(notes)["identity"])
        cell = Cell(identity, runs)
        if cell.folder != folder:
            raise ValueError(f"it is that of {cell.folder.name}")
    recompute(cell)
    benchmark = _benchmark(identity.benchmark)
    hub = model["checkpoint"] if model["hub"] else ""
    weights = Weights(
        Checkpoint(identity.variant.model, hub),
        model["family"],
        Path(model["checkpoint"]),
        model["revision"],
        model["trained"],
    )
    return cell_rows(weights, benchmark, cell, csv)


def _identity(recorded: dict[str, Any]) -> Identity:
    return Identity(**{**recorded, "variant": Variant.from_json(recorded["variant"])})


def _benchmark(name: str) -> benchmarks.Benchmark:
    return benchmarks.load(name) if name in benchmarks.names() else benchmarks.undeclared(name)
