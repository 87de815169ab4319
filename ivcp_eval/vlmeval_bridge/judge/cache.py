"""Verdicts by content, in one append-only file per judge, shared by all runs and by processes that run at once."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivcp_eval.files import DAMAGE, disk_full_as_clear_error, hold_lock, sealed_line, storable, unsealed_line


class VerdictCache:
    """Records with a "key" and a "verdict", one JSON line each; the first record of a key counts.

    Each line is appended whole, with its checksum, under a lock that is held only for that moment. A line that a kill
    cut short, or that was changed since, stays behind as one unreadable line and costs one verdict.

    Attributes:
        unreadable: how many such lines there are.
    """

    def __init__(self, folder: Path, judge: str) -> None:
        self.path = folder / f"{re.sub(r'[^A-Za-z0-9._@-]+', '_', judge)}.jsonl"
        self.unreadable = 0
        self._records: dict[str, dict[str, Any]] = {}
        self._read_to = 0
        self._lock = threading.Lock()
        self.refresh()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> str | None:
        """The verdict, or None if there is none yet."""
        record = self._records.get(key)
        return None if record is None else str(record["verdict"])

    def refresh(self) -> None:
        """Read what other processes have added."""
        if not self.path.is_file():
            return
        with self._lock, self.path.open("rb") as file:
            file.seek(self._read_to)
            content = file.read()
            whole = content.rfind(b"\n") + 1  # an unfinished line may be another process's, still being written
            for line in content[:whole].split(b"\n"):
                self._take(line)
            self._read_to += whole

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            record = json.loads(unsealed_line(line).decode())
            if not isinstance(record["verdict"], str) or not isinstance(record["key"], str):
                raise TypeError
        except DAMAGE:
            self.unreadable += 1
        else:
            self._records.setdefault(record["key"], record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record (with "key" and "verdict") and hand it to the operating system.

        Raises:
            DiskFullError: no space is left; the records before it are whole.
        """
        line = sealed_line(storable(json.dumps(dict(record), ensure_ascii=False, sort_keys=True)).encode())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("a+b", buffering=0) as file:
            hold_lock(file, self.path)
            size = file.seek(0, 2)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a killed process's stump: end it, so that it spoils only itself
                    line = b"\n" + line
            try:
                with disk_full_as_clear_error(self.path, self.path.with_suffix(".partial")):
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, "only part of the line was written")
            except OSError:
                with contextlib.suppress(OSError):  # a stump that stays is as harmless as a killed process's
                    file.truncate(size)
                raise
            self._records.setdefault(record["key"], dict(record))
