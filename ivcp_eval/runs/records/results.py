"""The CSV and the wide tables of a sweep, from its records alone: no weights, no data, no GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ivcp_eval import benchmarks
from ivcp_eval.interface import Checkpoint
from ivcp_eval.interface.models import Weights
from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.table import Row, write_results
from ivcp_eval.reports.wide import write_tables
from ivcp_eval.runs.planning import cells
from ivcp_eval.runs.planning.cells import Cell, Identity
from ivcp_eval.runs.records.record import cell_rows


@dataclasses.dataclass(frozen=True)
class Built:
    """What was written.

    Attributes:
        csv: one row per cell and metric. tables: wide tables. missing: cells without a record. unfinished: cells whose
            record says why they have no score. skipped: cells whose method their model cannot run, with the reason.
    """

    csv: Path
    tables: list[Path]
    missing: int
    unfinished: list[str]
    skipped: list[str]


def build(name: str, runs: Path | None = None, output: Path | None = None) -> Built:
    """Write ``results/<name>.csv`` and its tables from the manifest that a run of the sweep left.

    Raises:
        FileNotFoundError: the sweep has never run with these ``runs``.
    """
    runs = runs or cells.RUNS
    manifest = runs.parent / "sweeps" / name / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest} is not there: sweep {name!r} has not run; start it with `ivcp sweep run`")
    noted = json.loads(manifest.read_text(encoding="utf-8"))
    csv = output or runs.parent / f"{name}.csv"
    found: list[Row] = []
    planned: dict[str, list[str]] = {}
    missing = 0
    for entry in noted["cells"]:
        folder = runs / entry["folder"]
        planned.setdefault(entry["model"], []).append(folder.parent.name)  # its benchmark (`Cell.folder`)
        if (folder / "run.json").is_file():
            found += _rows(folder, runs, noted["models"][entry["model"]], csv)
        else:
            missing += 1
    csv.parent.mkdir(parents=True, exist_ok=True)
    write_results(csv, found)
    unfinished = [_reason(row) for row in found if row["status"] not in ("ok", "skipped")]
    skipped = [_reason(row) for row in found if row["status"] == "skipped"]
    tables = write_tables(csv, planned) if found else []
    return Built(csv, tables, missing, unfinished, skipped)


def _reason(row: Row) -> str:
    variant = f"{row['method']} {row['budget'] or 'r'}{row['ratio_asked']:g}"
    return f"{row['model']} {variant} on {row['benchmark']}: {row['reason']}"


def _rows(folder: Path, runs: Path, model: dict[str, Any], csv: Path) -> list[Row]:
    identity = _identity(json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"])
    benchmark = _benchmark(identity.benchmark)
    hub = model["checkpoint"] if model["hub"] else ""
    weights = Weights(
        Checkpoint(identity.variant.model, hub),
        model["family"],
        Path(model["checkpoint"]),
        model["revision"],
        model["trained"],
    )
    return cell_rows(weights, benchmark, Cell(identity, runs), csv)


def _identity(noted: dict[str, Any]) -> Identity:
    return Identity(**{**noted, "variant": Variant.from_json(noted["variant"])})


def _benchmark(name: str) -> benchmarks.Benchmark:
    return benchmarks.load(name) if name in benchmarks.names() else benchmarks.undeclared(name)
