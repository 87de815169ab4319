"""Atomic writing: whole or absent, whatever goes wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from ivcp_eval.files import DiskFullError, atomic_write, file_digest, write_json


def test_text_and_bytes_arrive_unchanged(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as stream:
        stream.write("é\r\n\n")
    with atomic_write(tmp_path / "b.bin", "wb") as stream:
        stream.write(b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\n\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_nothing_under_the_final_name_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with atomic_write(target) as stream:
        stream.write("new")
        stream.flush()
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def _write_half(target: Path, error: BaseException) -> None:
    with atomic_write(target) as stream:
        stream.write("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(error)):
        _write_half(target, error)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_full_disk_is_a_clear_error_without_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(DiskFullError, match="free some space") as caught, atomic_write(target) as stream:
        stream.write("new")
    assert caught.value.errno == errno.ENOSPC
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_raises_the_same_error(tmp_path: Path) -> None:
    from ivcp_eval.files import disk_full_as_clear_error

    temporary = tmp_path / "part"
    temporary.write_text("x")
    with (
        pytest.raises(DiskFullError),
        disk_full_as_clear_error(tmp_path / "a", temporary),
        Path("/dev/full").open("w") as stream,
    ):
        stream.write("x" * 100_000)
    assert not temporary.exists()


def test_other_os_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "no" / "folder.txt"):
        pass
    with pytest.raises(ValueError, match="mode must be"), atomic_write(tmp_path / "a", "a"):
        pass


def test_permissions_follow_the_umask_and_links_survive(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "a.txt") as stream:
            stream.write("1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644
    (tmp_path / "link").symlink_to(tmp_path / "a.txt")
    with atomic_write(tmp_path / "link") as stream:
        stream.write("2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "2"


def test_json_refuses_nan_and_digest_matches(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, "é"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, "é"]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, "é"]}
    assert file_digest(tmp_path / "a.json") == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()
