"""What an evaluation that is whole was made from, so that asking for it again prints its table without planning it.

Planning imports torch and every method; a table of numbers that are there needs neither. The note holds the size and
time of change of every file that took part. If one of them is another, planning decides what is still good.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ivcp_eval.files import DAMAGE, read_json, source_files, write_json
from ivcp_eval.runs.planning.cells import versions


@dataclass(frozen=True)
class Finished:
    """A finished evaluation: its results file, and the ``run_id`` of its rows in it."""

    csv: Path
    run_ids: frozenset[str]


def eval_state(runs: Path, name: str) -> Path:
    """Folder of an evaluation's leases, marks and logs, beside the folder where cells live."""
    return runs.parent / "eval" / "state" / name


def note(state: Path, finished: Finished, inputs: Iterable[Path]) -> None:
    """Note that an evaluation is whole.

    Args:
        state: its folder. inputs: weights, data and records; source files are added.
    """
    files = {str(path.resolve()): _stamp(path) for path in [*inputs, *source_files()]}
    csv = str(finished.csv.resolve())
    write_json(_path(state), {"csv": csv, "runs": sorted(finished.run_ids), "versions": versions(), "files": files})


def known(state: Path) -> Finished | None:
    """The finished evaluation, if nothing that it was made from has changed since."""
    try:
        recorded = read_json(_path(state), "it is only a note")
        same = recorded["versions"] == versions() and all(
            _stamp(Path(path)) == stamp for path, stamp in recorded["files"].items()
        )
        finished = Finished(Path(recorded["csv"]), frozenset(recorded["runs"]))
    except (OSError, *DAMAGE):  # not there, damaged, or an input is gone
        return None
    return finished if same and finished.csv.is_file() else None


def usual_csv(runs: Path, model: str) -> Path:
    """Where the rows of a model's evaluations go unless the user names another file."""
    return runs.parent / "eval" / f"{model}.csv"


def csv_of(state: Path, runs: Path, model: str) -> Path:
    """The results file of an evaluation: where it was once whole, whatever changed since, else the usual one."""
    try:
        return Path(read_json(_path(state), "it is only a note")["csv"])
    except (OSError, *DAMAGE):
        return usual_csv(runs, model)


def _path(state: Path) -> Path:
    return state / "finished.json"


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
