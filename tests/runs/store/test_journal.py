"""The journal survives kills, a full disk and a second writer."""

from __future__ import annotations

import errno
import json
import multiprocessing
from pathlib import Path

import pytest

from ivcp_eval.files import DiskFullError
from ivcp_eval.interface.records import Answer
from ivcp_eval.runs.store.journal import Journal
from tests.answers import answer


def _records(path: Path) -> dict[str, Answer]:
    with Journal(path).open() as journal:
        return dict(journal.records)


@pytest.mark.parametrize("cut", range(1, 40))
def test_any_cut_of_the_last_line_loses_that_line_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path).open() as journal:
        journal.append("a", answer("first"))
        whole = path.stat().st_size
        journal.append("b", answer("second, the longer one"))
    end = path.stat().st_size
    cut = min(cut, end - whole)
    with path.open("r+b") as file:
        file.truncate(end - cut)
    assert set(_records(path)) == {"a"}
    with Journal(path).open() as journal:
        journal.append("c", answer("after"))
    assert set(_records(path)) == {"a", "c"}
    assert path.read_bytes().count(b"\n") == 2


def test_last_record_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path).open() as journal:
        journal.append("a", Answer(error="OSError"))
        journal.append("a", answer("yes\u2028\r"))
    assert _records(path)["a"].prediction == "yes\u2028\r"


class _FullDisk:
    """A file whose writes stop in the middle, as on a full disk."""

    def __init__(self, file: object, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.file.write(data[: self.room])  # type: ignore[attr-defined]
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 12])
def test_full_disk_is_said_and_harms_nothing(tmp_path: Path, room: int) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path).open() as journal:
        journal.append("a", answer("first"))
        real = journal._file
        journal._file = _FullDisk(real, room)
        with pytest.raises(DiskFullError, match="full"):
            journal.append("b", answer("second"))
        assert "b" not in journal.records
        journal._file = real
        journal.append("c", answer("third"))
    assert set(_records(path)) == {"a", "c"}


def _hold(path: Path, ready: object, release: object) -> None:
    with Journal(path).open():
        ready.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


def test_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(path, ready, release))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(RuntimeError, match="another process"), Journal(path).open():
            pass
    finally:
        release.set()
        holder.join(30)
    assert _records(path) == {}


def test_an_edited_answer_is_noticed_and_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path).open() as journal:
        for key in "abc":
            journal.append(key, answer("no"))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"prediction": "no"', b'"prediction": "yes"')
    path.write_bytes(b"".join(lines))
    journal = Journal(path)
    assert set(journal.load()) == {"a", "c"}
    assert journal.damaged == {2: "changed since it was written"}
    assert str(path) in str(journal.damage)
    assert "answered again" in str(journal.damage)
    lines[1] = lines[1].replace(b"checksum", b"check_sum")
    path.write_bytes(b"".join(lines))
    assert set(journal.load()) == {"a", "c"}


def test_a_line_that_lost_its_checksum_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({"key": "a", **answer("yes").to_json()}) + "\n")
    with Journal(path).open() as journal:
        journal.append("b", answer("no"))
    journal = Journal(path)
    assert set(journal.load()) == {"b"}
    assert journal.damaged == {1: "without its checksum"}


GARBAGE = {
    "binary": b"\x80\xff\n",
    "text": b"hello\n",
    "half a line": b'{"key": "x", "predi\n',
    "half a line and a whole one": b'{"key": "x", "predi{"key": "y"}\n',
    "NULs": bytes(4096) + b"\n",
    "carriage returns": b"\r\r\n",
    "empty": b"\n",
    "deep": b"[" * 50_000 + b"\n",
    "a number": b"7\n",
    "no key": b'{"prediction": "yes"}\n',
    "a key of another type": b'{"key": 7}\n',
    "no answer": b'{"key": "x"}\n',
    "a text that is none": b'{"key": "x", "error": "e", "prediction": null}\n',
    "numbers of another type": b'{"key": "x", "error": "e", "visual_per_layer": ["a"]}\n',
    "below zero": b'{"key": "x", "error": "e", "visual_tokens": -1}\n',
    "half a character": b'{"key": "x", "error": "\\ud800"}\n',
    "4300 digits": b'{"key": "x", "error": "e", "new_tokens": ' + b"9" * 5000 + b"}\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_costs_its_own_line(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path).open() as journal:
        journal.append("a", answer("first"))
    with path.open("ab") as file:
        file.write(garbage)
    with Journal(path).open() as journal:
        assert set(journal.records) == {"a"}
        assert set(journal.damaged) == {2}
        journal.append("b", answer("behind it"))
    assert set(_records(path)) == {"a", "b"}


def test_answers_are_text_that_a_file_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path).open() as journal:
        journal.append("a", Answer.failed(ValueError("half \ud83d of a pair")))
    assert _records(path)["a"].error == "ValueError: half \ufffd of a pair"
