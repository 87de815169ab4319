"""Claims on units of work by files that every worker sees, on one machine or a shared file system.

A claim is a file created exclusively, kept fresh by a heartbeat. One that has not been refreshed for long, or whose
process is gone from this machine, is taken over. Should two workers ever hold one claim, they do no harm: answers are
appended to locked journals and keyed by content.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
        if _token(path) == token:
            path.unlink(missing_ok=True)


def held(path: Path, expires_s: float = EXPIRES_S) -> bool:
    """Whether a live worker holds it."""
    return path.exists() and not _abandoned(path, expires_s)


def _create(path: Path, token: str) -> bool:
    text = json.dumps({"token": token, "host": socket.gethostname(), "pid": os.getpid()})
    try:
        with path.open("x", encoding="utf-8") as stream:
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
    try:
        age = _now(path.parent) - path.stat().st_mtime
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        # Being written or removed this moment; a worker killed in between leaves an empty file, which ages.
        holder = {}
        try:
            age = _now(path.parent) - path.stat().st_mtime
        except FileNotFoundError:
            return False
    if holder.get("host") == socket.gethostname() and not _alive(int(holder["pid"])):
        return True
    return age > expires_s


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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _token(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("token"))
    except (FileNotFoundError, json.JSONDecodeError):
        return ""


def _beat(path: Path, token: str, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with suppress(OSError):  # given back this moment, or a file system that hiccups: the next beat comes soon
            if _token(path) == token:
                os.utime(path)
