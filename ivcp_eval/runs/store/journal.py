"""An append-only file of answers that survives a kill at any moment."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivcp_eval.files import disk_full_as_clear_error
from ivcp_eval.interface.records import Answer


class JournalHeld(RuntimeError):
    """Another process is writing it."""


class Journal:
    """Answers by the key of their prompt, one JSON line each. The last answer of a key counts.

    A line that a kill cut short is dropped when the file is opened again; the answers before it are whole, since each
    is written and flushed at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Answer] = {}
        self._file: Any = None

    @contextmanager
    def open(self) -> Iterator[Journal]:
        """Read what is there and hold the file, alone, for appending.

        Raises:
            JournalHeld: by another process. ValueError: a line that is whole and yet no answer.
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

    def load(self) -> dict[str, Answer]:
        """The records as they are now, without holding the file, which another process may be writing."""
        if self.path.is_file():
            self._read(self.path.read_bytes())
        return self.records

    def _read(self, content: bytes) -> int:
        """Fill `records`; returns the length of the readable part."""
        self.records = {}
        whole = 0
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:  # neither JSON nor, after a crash of the machine, text
                break
            try:
                key, answer = entry(record)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: {error}") from error
            self.records[key] = answer
            whole += len(line)
        return whole

    def sync(self) -> None:
        """Wait until all of it is on the disk, where not even a crash of the machine undoes it."""
        os.fsync(self._file.fileno())

    def append(self, key: str, answer: Answer) -> None:
        """Write one answer and flush it to the operating system.

        Raises:
            DiskFullError: no space is left; what was written of the answer is removed.
        """
        line = (json.dumps({"key": key, **answer.to_json()}, ensure_ascii=False, sort_keys=True) + "\n").encode()
        start = self._file.seek(0, os.SEEK_END)
        try:
            with disk_full_as_clear_error(self.path, self.path.with_suffix(".partial")):
                rest = memoryview(line)
                while rest:  # a disk that is almost full takes a part
                    rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(start)
            raise
        self.records[key] = answer


def entry(record: Any) -> tuple[str, Answer]:
    """The key and the answer of a journal line.

    Args:
        record: the line, parsed.

    Raises:
        ValueError: it has no key, or is no answer (`Answer.from_json`).
    """
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        raise ValueError(f'a journal line is an object with a text "key", not {str(record)[:80]}')
    return record.pop("key"), Answer.from_json(record)
