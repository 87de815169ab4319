"""An append-only file of per-sample records that survives a kill at any moment."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivcp_eval.files import disk_full_as_clear_error


class JournalHeld(RuntimeError):
    """Another process is writing it."""


class Journal:
    """Records by key, one JSON line each. The last record of a key counts.

    A line that a kill cut short is dropped when the file is opened again; the records before it are whole, since each
    is written and flushed at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self._file: Any = None

    @contextmanager
    def open(self) -> Iterator[Journal]:
        """Read what is there and hold the file, alone, for appending.

        Raises:
            JournalHeld: by another process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refused must not stay in a buffer, to be written after the next record.
        with self.path.open("a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise JournalHeld(
                    f"another process is evaluating this cell ({self.path.parent}); wait for it, or stop it"
                ) from error
            file.seek(0)
            whole = self._read(file.read())
            file.truncate(whole)
            self._file = file
            try:
                yield self
            finally:
                self._file = None

    def load(self) -> dict[str, dict[str, Any]]:
        """The records as they are now, without holding the file, which another process may be writing."""
        if self.path.is_file():
            self._read(self.path.read_bytes())
        return self.records

    def _read(self, content: bytes) -> int:
        """Fill `records`; returns the length of the readable part."""
        self.records = {}
        whole = 0
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:  # neither JSON nor, after a crash of the machine, text
                break
            self.records[record["key"]] = record
            whole += len(line)
        return whole

    def sync(self) -> None:
        """Wait until all of it is on the disk, where not even a crash of the machine undoes it."""
        os.fsync(self._file.fileno())

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record (with its "key") and flush it to the operating system.

        Raises:
            DiskFullError: no space is left; what was written of the record is removed.
        """
        line = (json.dumps(dict(record), ensure_ascii=False, sort_keys=True) + "\n").encode()
        start = self._file.seek(0, os.SEEK_END)
        try:
            with disk_full_as_clear_error(self.path, self.path.with_suffix(".partial")):
                rest = memoryview(line)
                while rest:  # a disk that is almost full takes a part
                    rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(start)
            raise
        self.records[record["key"]] = dict(record)
