"""Atomic writing: whole or absent, whatever goes wrong."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ivcp_eval import files
from ivcp_eval.benchmarks.refcoco.partial import PartialTsv
from ivcp_eval.files import (
    DamagedError,
    DiskFullError,
    NoLocksError,
    atomic_write,
    file_digest,
    locked,
    read_json,
    storable,
    write_json,
)
from ivcp_eval.runs.store.journal import Journal
from ivcp_eval.vlmeval_bridge.judge.cache import VerdictCache
from ivcp_eval.vlmeval_bridge.reading.pictures import alone


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


def test_a_file_that_was_changed_is_told_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, "é"], "a": None}, sealed=True)
    assert read_json(path, "") == {"b": [1, 2.5, "é"], "a": None}
    path.write_text(path.read_text().replace("2.5", "3.5"))
    with pytest.raises(DamagedError, match=r"a\.json is damaged \(ValueError: changed since .*\); do this"):
        read_json(path, "do this")
    write_json(path, {"b": 1})
    assert read_json(path, "") == {"b": 1}, "files of an earlier version have none"


def test_half_a_character_is_replaced() -> None:
    assert storable("a\ud83db") == "a\ufffdb"
    assert storable("a\U0001f600é") == "a\U0001f600é"


def locks(folder: Path) -> dict[str, Callable[[], Any]]:
    """Whatever locks a file."""

    def journal() -> None:
        with Journal(folder / "journal.jsonl").open():
            pass

    def results() -> None:
        with locked(folder / "results.csv"):
            pass

    def pictures() -> None:
        with alone(SimpleNamespace(img_root=str(folder / "images"))):
            pass

    def conversion() -> None:
        with PartialTsv(folder / "RefCOCO_val.tsv", "print"):
            pass

    def verdicts() -> None:
        VerdictCache(folder, "judge").add({"key": "a", "verdict": "1"})

    return {f.__name__: f for f in (journal, results, pictures, conversion, verdicts)}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("what", list(locks(Path())))
def test_a_file_system_without_locks_is_said(
    tmp_path: Path, what: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(NoLocksError, match=f"the file system of {tmp_path}.* has no locks .*--runs") as caught:
        locks(tmp_path)[what]()
    assert "\n" not in str(caught.value)


def test_every_lock_is_taken_in_one_place() -> None:
    """So that what is said of a file system without locks is said everywhere."""
    package = Path(files.__file__).parent
    assert [p.name for p in package.rglob("*.py") if "flock(" in p.read_text(encoding="utf-8")] == ["files.py"]


@pytest.mark.parametrize("text", ["=1+1", "\n=1+1", "\x00=1", "\uff1d1", "\uff20SUM(1)", "\r\n@SUM(1)", "'=1", "-2+3"])
def test_no_cell_is_a_formula_and_all_come_back(text: str) -> None:
    shown = files.as_shown(text)
    assert shown.startswith("'")
    assert files.as_read(shown) == text


@pytest.mark.parametrize("text", ["-2.5", "a = b", "\n", "", "[1, 2]"])
def test_plain_cells_stay(text: str) -> None:
    assert files.as_shown(text) == text
    assert files.as_read(text) == text


def test_every_csv_that_people_open_is_written_through_as_shown() -> None:
    """No formula for a spreadsheet and no escape sequence for a terminal; training tables hold our own numbers only."""
    package = Path(files.__file__).parent
    folders = (package / "reports", package / "lab" / "bench")
    texts = {path.name: path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")}
    writers = {name for name, text in texts.items() if re.search(r"csv\.(DictWriter|writer)\(", text)}
    assert len(writers) >= 5
    assert [name for name in sorted(writers) if "as_shown(" not in texts[name]] == []


def test_published_numbers_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ivc_prune_paper.csv", "results/baselines/ivc_prune_paper.csv"):
        assert files.results_file(name) == files.BASELINES / "ivc_prune_paper.csv"
    (tmp_path / "ivc_prune_paper.csv").write_text("")
    assert files.results_file("ivc_prune_paper.csv") == Path("ivc_prune_paper.csv")
    assert files.results_file("other/ivc_prune_paper.csv") == Path("other/ivc_prune_paper.csv")
