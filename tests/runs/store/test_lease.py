"""Claims: one holder at a time, abandoned ones are taken over, and a heartbeat keeps a long one."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import socket
import time
from pathlib import Path

import pytest

from ivcp_eval.files import DiskFullError
from ivcp_eval.runs.store import lease
from ivcp_eval.runs.store.lease import claim, held, holder


def abandoned(path: Path, pid: int, host: str = "", age: float = 0.0) -> None:
    path.write_text(json.dumps({"token": "x", "host": host or socket.gethostname(), "pid": pid}))
    os.utime(path, (time.time() - age,) * 2)


def dead_process() -> int:
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    assert process.pid is not None
    return process.pid


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.lease"
    with claim(path) as mine:
        assert mine
        assert held(path)
        with claim(path) as yours:
            assert not yours
        assert path.exists(), "who did not get it does not remove it"
    assert list(path.parent.iterdir()) == []


def test_a_dead_process_and_an_old_claim_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    abandoned(path, dead_process())
    assert not held(path)
    with claim(path) as mine:
        assert mine
    abandoned(path, 1, "another-host", age=30)
    with claim(path, expires_s=60) as mine:
        assert not mine
    with claim(path, expires_s=20) as mine:
        assert mine
    path.write_text("")  # a worker killed while it claimed
    assert held(path)
    os.utime(path, (time.time() - 100,) * 2)
    with claim(path) as mine:
        assert mine
    assert list(tmp_path.iterdir()) == []


def test_the_heartbeat_keeps_it_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    path = tmp_path / "x.lease"
    with claim(path) as mine:
        assert mine
        os.utime(path, (time.time() - 1000,) * 2)
        end = time.monotonic() + 10
        while time.time() - path.stat().st_mtime > 100 and time.monotonic() < end:
            time.sleep(0.02)
        assert time.time() - path.stat().st_mtime < 100


def test_who_lost_it_does_not_remove_the_new_holder_s(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    with claim(path) as mine:
        assert mine
        abandoned(path, os.getpid())
    assert json.loads(path.read_text())["token"] == "x"


def race(path: str, log: str) -> None:
    got = 0
    while got < 8:
        with claim(Path(path)) as mine:
            if mine:
                got += 1
                with Path(log).open("a") as stream:
                    stream.write(f"+{os.getpid()}\n")
                time.sleep(0.002)
                with Path(log).open("a") as stream:
                    stream.write(f"-{os.getpid()}\n")


def test_processes_never_hold_it_together(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=race, args=(str(tmp_path / "x.lease"), str(log))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = log.read_text().split()
    assert len(lines) == 2 * 4 * 8
    assert all(a[0] == "+" and b == "-" + a[1:] for a, b in zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.parametrize("host", ["", "another-host"])
def test_a_claim_from_the_future_is_taken_over(tmp_path: Path, host: str) -> None:
    """A clock that was set back, here or elsewhere; a holder that lives refreshes it within seconds."""
    path = tmp_path / "x.lease"
    abandoned(path, os.getpid(), host, age=-365 * 86400)
    assert not held(path)
    with claim(path) as mine:
        assert mine
        assert held(path)
    abandoned(path, os.getpid(), host, age=-30)
    assert held(path), "no further than a claim may be old"


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b"7", b"\x80\xff", bytes(60), b"[" * 100_000, b'{"host": "HOST", "pid": "x"}', b'{"host": "HOST"}',
     b'{"host": "HOST", "pid": -1}', b'{"host": "HOST", "pid": 99999999999999999999}', b'{"host": 7, "pid": {}}'],
)  # fmt: skip
def test_a_damaged_claim_ages_like_any_other(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.lease"
    path.write_bytes(content.replace(b"HOST", socket.gethostname().encode()))
    assert held(path) == (b"HOST" not in content), "a process that cannot be is not waited for"
    assert bool(holder(path)) == held(path)
    os.utime(path, (time.time() - 100,) * 2)
    with claim(path) as mine:
        assert mine
    assert list(tmp_path.iterdir()) == []


def test_whom_one_waits_for(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    assert holder(path) == ""
    abandoned(path, 4711, "node-7", age=30)
    assert holder(path).startswith(f"process 4711 on node-7 ({path}), whose claim ends")
    assert "90 s after its last sign of life" in holder(path)


def test_a_full_disk_is_said_and_leaves_no_claim(tmp_path: Path) -> None:
    path = tmp_path / "x.lease"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # the kernel takes not a byte of a file
    try:
        with pytest.raises(DiskFullError, match=r"x\.lease was not written"), claim(path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists(), "an empty one would be waited for"
