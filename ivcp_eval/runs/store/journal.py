"""An append-only file of answers that survives a kill at any moment; damage costs the damaged line only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivcp_eval.files import DAMAGE, DamagedError, disk_full_as_clear_error, hold_lock, sealed_line, unsealed_line
from ivcp_eval.interface.records import Answer

ANSWERED_AGAIN = "what is missing does not count and is answered again by the next run, all other lines count"
_MOST = 3  # damaged lines whose reason is spelled out


class JournalHeld(RuntimeError):
    """Another process is writing it."""


class Journal:
    """Answers by the key of their prompt, one JSON line each. The last answer of a key counts.

    A line that a kill cut short is dropped when the file is opened again; the answers before it are whole, since each
    is written and flushed at once. A line that is whole and yet no answer, or not the one its checksum was made of,
    does not count: its sample is answered again, and the line stays where it is.

    Attributes:
        records: the answers. damaged: number of a line that does not count -> why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Answer] = {}
        self.damaged: dict[int, str] = {}
        self._file: Any = None

    @contextmanager
    def open(self) -> Iterator[Journal]:
        """Read what is there and hold the file, alone, for appending.

        Raises:
            JournalHeld: by another process. NoLocksError: the file system has no locks.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refused must not stay in a buffer, to be written after the next record.
        with self.path.open("a+b", buffering=0) as file:
            try:
                hold_lock(file, self.path, wait=False)
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

    @property
    def damage(self) -> DamagedError | None:
        """What is said of the lines that do not count; None if all do."""
        if not self.damaged:
            return None
        reasons = [f"line {number}: {why}" for number, why in list(self.damaged.items())[:_MOST]]
        more = [f"and {len(self.damaged) - _MOST} more"] if len(self.damaged) > _MOST else []
        return DamagedError(self.path, "; ".join([*reasons, *more]), ANSWERED_AGAIN)

    def _read(self, content: bytes) -> int:
        """Fill `records` and `damaged`; returns the length of the whole lines."""
        self.records, self.damaged = {}, {}
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                key, answer = entry(line)
            except ValueError as error:
                self.damaged[number] = str(error)
            else:
                self.records[key] = answer
        return whole

    def sync(self) -> None:
        """Wait until all of it is on the disk, where not even a crash of the machine undoes it."""
        os.fsync(self._file.fileno())

    def append(self, key: str, answer: Answer) -> None:
        """Write one answer and flush it to the operating system.

        Raises:
            DiskFullError: no space is left; what was written of the answer is removed.
        """
        line = line_of(key, answer)
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


def line_of(key: str, answer: Answer) -> bytes:
    """The line of an answer: its fields, and last the checksum of the line without it."""
    body = json.dumps({"key": key, **answer.to_json()}, ensure_ascii=False, sort_keys=True).encode()
    return sealed_line(body)


def entry(line: bytes) -> tuple[str, Answer]:
    """The key and the answer of a journal line.

    Raises:
        ValueError: the line was changed since it was written, has no key, or is no answer (`Answer.from_json`).
    """
    body = unsealed_line(line)
    try:
        record = json.loads(body.decode())
    except UnicodeDecodeError:
        raise ValueError("not text") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        raise ValueError('not an object with a text "key"')
    try:
        return record.pop("key"), Answer.from_json(record)
    except DAMAGE as error:
        raise ValueError(f"no answer: {error}") from None
