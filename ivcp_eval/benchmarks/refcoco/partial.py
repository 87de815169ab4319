"""The output file while it grows: hidden, locked, resumable, and renamed to its final name only when whole."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ivcp_eval.benchmarks.refcoco.images import MIN_BASE64
from ivcp_eval.benchmarks.refcoco.records import COLUMNS, ConversionError
from ivcp_eval.files import (
    DamagedError,
    DiskFullError,
    commit_file,
    disk_full_as_clear_error,
    file_digest,
    hold_lock,
    read_json,
    write_json,
)

__all__ = ["PARTIAL", "PartialTsv", "is_up_to_date", "not_whole", "report_path"]

#: How what is said of a partial file begins, in the reason of results too.
PARTIAL = "the test set is not whole"
_HEADER = ("\t".join(COLUMNS) + "\n").encode()


def report_path(target: Path) -> Path:
    """``RefCOCO_val.tsv`` -> ``RefCOCO_val.tsv.report.json``."""
    return target.with_name(f"{target.name}.report.json")


def is_up_to_date(target: Path, fingerprint: str, skip_bad: bool) -> bool:
    """Whether ``target`` is whole and was made from exactly these inputs (``fingerprint``), by its report.

    A file that lacks entries only counts if leaving them out is still asked for (``skip_bad``).
    """
    report = _read_json(report_path(target))
    return (
        target.is_file()
        and report.get("fingerprint") == fingerprint
        and (skip_bad or report.get("skipped") == 0)
        and report.get("bytes") == target.stat().st_size
        and report.get("md5") == file_digest(target, "md5")
    )


def not_whole(target: Path) -> str:
    """Why a converted file is not the whole test set, by the report beside it; empty if it is, or has no report."""
    path = report_path(target)
    if not path.is_file():
        return ""
    report = _read_json(path)
    if report.get("bytes") != target.stat().st_size:
        return f"{path.name} is not the report of {target.name}; convert the data set again"
    if report.get("complete"):
        return ""
    expected = report.get("expected_rows") or "an unknown number of"
    return (
        f"{PARTIAL}: {report.get('rows')} of {expected} expressions, {report.get('skipped')} skipped as "
        f"unusable (see {path.name})"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, "convert the data set again")
    except (OSError, DamagedError):
        return {}


class PartialTsv:
    """Context manager around ``.<name>.part`` beside the target.

    Lines go to the part file. If the process dies, the whole lines stay; the next run with the same fingerprint
    finds them in :attr:`done` and goes on. With another fingerprint it starts afresh. A part file is locked while in
    use. On a full disk it is removed, because it would keep the disk full.

    Attributes:
        done: indices of the rows already written, and whether each holds an image (else it refers to another row).
    """

    def __init__(self, target: Path, fingerprint: str) -> None:
        self.target = target
        self.done: dict[str, bool] = {}
        self._fingerprint = fingerprint
        self._part = target.with_name(f".{target.name}.part")
        self._note = target.with_name(f".{target.name}.part.json")
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> PartialTsv:
        self._stream = os.fdopen(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            hold_lock(self._stream, self._part, wait=False)
        except BlockingIOError as error:
            self._stream.close()
            raise ConversionError(f"another conversion is writing {self.target}; wait for it to end") from error
        except OSError:
            self._stream.close()
            raise
        if _read_json(self._note).get("fingerprint") == self._fingerprint:
            self._keep_whole_lines(self._stream)
        if not self.done:
            with disk_full_as_clear_error(self.target, self._part):
                # First empty the file, then say what it belongs to: the other order could adopt foreign rows.
                self._stream.seek(0)
                self._stream.truncate()
                self._stream.write(_HEADER)
                self._stream.flush()
                write_json(self._note, {"fingerprint": self._fingerprint})
        return self

    def _keep_whole_lines(self, stream: IO[bytes]) -> None:
        end = 0
        for number, line in enumerate(stream):
            if not line.endswith(b"\n") or line.count(b"\t") != len(COLUMNS) - 1 or (number == 0 and line != _HEADER):
                break
            end += len(line)
            if number:
                index, image = line.split(b"\t", 2)[:2]
                self.done[index.decode()] = len(image) >= MIN_BASE64
        stream.seek(end)
        stream.truncate()

    def write(self, line: str) -> None:
        """Append one whole line.

        Raises:
            DiskFullError: no space left; the part file is gone.
        """
        assert self._stream is not None, "use PartialTsv in a with statement"
        with disk_full_as_clear_error(self.target, self._part):
            self._stream.write(line.encode())

    def finish(self, report: dict[str, Any]) -> dict[str, Any]:
        """Give the file its name and write the report beside it; returns the report with size, MD5, fingerprint.

        The report comes first: a crash between the two leaves a report whose MD5 no file has, never a data set
        without its report.
        """
        assert self._stream is not None, "use PartialTsv in a with statement"
        with disk_full_as_clear_error(self.target, self._part):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        full = {
            **report,
            "bytes": self._part.stat().st_size,
            "md5": file_digest(self._part, "md5"),
            "fingerprint": self._fingerprint,
        }
        write_json(report_path(self.target), full)
        commit_file(self._part, self.target)
        self._note.unlink(missing_ok=True)
        return full

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        try:
            with disk_full_as_clear_error(self.target, self._part):
                self._stream.close()
        except OSError:
            if error is None:
                raise
        if isinstance(error, DiskFullError):  # perhaps for another file of the same run: make room for all
            self._part.unlink(missing_ok=True)
            self._note.unlink(missing_ok=True)
