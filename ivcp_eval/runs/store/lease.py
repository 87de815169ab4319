"""Claims on units of work by files that every worker sees, on one machine or a shared file system.

A claim is a file created exclusively, kept fresh by a heartbeat. One that has not been refreshed for long, whose time
lies as far in the future (a clock was set back; a live holder's next beat mends it), or whose process is gone from this
machine, is taken over. Should two workers ever hold one claim, they do no harm: answers are appended to locked journals
and keyed by content.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivcp_eval.files import DamagedError, disk_full_as_clear_error, read_json

EXPIRES_S = 90.0
BEAT_S = 10.0


@contextmanager
def claim(path: Path, expires_s: float = EXPIRES_S) -> Iterator[bool]:
    """Hold ``path`` while the block runs; yields False at once if another live worker does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    if not _create(path, token) and not (_abandoned(path, expires_s) and _take_over(path, token)):
        yield False
        return
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, token, done), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        done.set()
        beat.join()
        if _read(path).get("token") == token:
            path.unlink(missing_ok=True)


def held(path: Path, expires_s: float = EXPIRES_S) -> bool:
    """Whether a live worker holds it."""
    return path.exists() and not _abandoned(path, expires_s)


def holder(path: Path, expires_s: float = EXPIRES_S) -> str:
    """Who holds it, in words; empty if no live worker does."""
    if not held(path, expires_s):
        return ""
    return (
        f"{_who(_read(path))} ({path}), whose claim ends when it does, or {expires_s:.0f} s after its last sign of life"
    )


@dataclass(frozen=True)
class Holder:
    """Who holds a claim.

    Attributes:
        claim: on what. who: process and machine. held_s: since when, in seconds; None where it was not noted.
        silent_s: seconds since its last sign of life.
    """

    claim: str
    who: str
    held_s: float | None
    silent_s: float


def holders(folder: Path, expires_s: float = EXPIRES_S) -> list[Holder]:
    """Every claim below ``folder`` that a live worker holds."""
    found = []
    for path in sorted(folder.glob("*.lease")):
        with suppress(FileNotFoundError):  # given back this moment
            if held(path, expires_s):
                recorded, now = _read(path), _now(folder)
                since = recorded.get("since")
                held_s = max(0.0, now - since) if isinstance(since, int | float) else None
                found.append(Holder(path.stem, _who(recorded), held_s, max(0.0, now - path.stat().st_mtime)))
    return found


def _who(recorded: Mapping[str, Any]) -> str:
    return (
        f"process {recorded['pid']} on {recorded['host']}" if {"pid", "host"} <= recorded.keys() else "somebody unnamed"
    )


def _create(path: Path, token: str) -> bool:
    text = json.dumps({"token": token, "host": socket.gethostname(), "pid": os.getpid(), "since": _now(path.parent)})
    try:
        with disk_full_as_clear_error(path, path), path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return False
    return True


def _take_over(path: Path, token: str) -> bool:
    """Remove an abandoned claim, then claim as anybody else may."""
    grave = path.with_name(f"{path.name}.{token}.old")
    try:
        path.rename(grave)  # only one of several that want it gets it
    except FileNotFoundError:
        return False
    grave.unlink(missing_ok=True)
    return _create(path, token)


def _abandoned(path: Path, expires_s: float) -> bool:
    recorded = _read(path)
    try:
        age = _now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if recorded.get("host") == socket.gethostname() and not _alive(recorded.get("pid")):
        return True
    return abs(age) > expires_s


def _now(folder: Path) -> float:
    """The file system's own time: clocks of machines that share it may differ."""
    probe = folder / f".clock.{os.getpid()}.{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # a full disk must not look like an abandoned claim
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _read(path: Path) -> dict[str, Any]:
    """What a claim says. It may be being written or removed, or be damaged: then nothing, and it ages all the same."""
    try:
        return read_json(path, "")
    except (FileNotFoundError, DamagedError):
        return {}


def _beat(path: Path, token: str, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with suppress(OSError):  # given back this moment, or a file system that hiccups: the next beat comes soon
            if _read(path).get("token") == token:
                os.utime(path)
