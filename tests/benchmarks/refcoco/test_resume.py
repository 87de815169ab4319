"""Finished, killed, foreign, locked and too large output files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.benchmarks.refcoco.convert import convert_mdetr
from ivcp_eval.benchmarks.refcoco.partial import PartialTsv
from ivcp_eval.benchmarks.refcoco.records import ConversionError
from ivcp_eval.files import DiskFullError
from tests.benchmarks.refcoco.data import Corpus, convert, count_reads, names, options, read_rows, truncate

ROOT = Path(__file__).parents[3]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_reads(monkeypatch)


def test_a_finished_file_is_left_alone_and_a_foreign_one_is_not_replaced(corpus: Corpus, reads: list[str]) -> None:
    first = convert(corpus)
    target = corpus.output / "RefCOCO_val.tsv"
    before = target.stat().st_mtime_ns
    reads.clear()
    assert convert(corpus) == first
    assert reads == []
    assert target.stat().st_mtime_ns == before
    corpus.images[0]["caption"] = "something else"
    with pytest.raises(ConversionError, match="--overwrite replaces it"):
        convert(corpus)
    convert(corpus, overwrite=True)
    assert read_rows(target)[0]["question"] == "something else"
    target.write_bytes(target.read_bytes()[:-1])  # damaged: no longer what the report describes
    with pytest.raises(ConversionError, match="--overwrite replaces it"):
        convert(corpus)


_KILL_AFTER = """
import os, signal, sys
from ivcp_eval import cli
from ivcp_eval.benchmarks.refcoco import partial
write, left = partial.PartialTsv.write, [int(sys.argv.pop(1))]
def dying(self, line):
    if not left[0]:
        self._stream.write(line[: len(line) // 2].encode())
        self._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(self, line)
partial.PartialTsv.write = dying
sys.exit(cli.main(["refcoco", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("rows", "read_again"), [(1, 2), (4, 1), (5, 0)])
def test_a_killed_run_is_continued(rows: int, read_again: int, tmp_path: Path, reads: list[str]) -> None:
    corpus = Corpus(tmp_path, images=3, per_image=2)
    order = [0, 1, 0, 1, 2, 2]
    for entry, number in zip(corpus.images, order, strict=True):
        entry["file_name"] = corpus.file_name(number)
    corpus.images[3]["caption"] = 'a "quoted" naïve\ttab'
    arguments = ["--images_folder", corpus.pictures, "--annotations_files", corpus.save(), "--workers", "1"]
    command = [sys.executable, "-c", _KILL_AFTER, str(rows), *map(str, arguments), "--allow-partial"]
    killed = subprocess.run([*command, "--output_dir", str(corpus.output)], cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert names(corpus.output) == [".RefCOCO_val.tsv.part", ".RefCOCO_val.tsv.part.json"]
    convert(corpus)
    assert len(reads) == read_again
    whole = convert_mdetr(corpus.path, corpus.pictures, tmp_path / "whole", options())
    assert whole["images"] == 3
    assert (corpus.output / "RefCOCO_val.tsv").read_bytes() == (tmp_path / "whole" / "RefCOCO_val.tsv").read_bytes()
    assert names(corpus.output) == names(tmp_path / "whole")


def test_a_part_of_other_inputs_is_not_continued(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PartialTsv, "finish", _stop)
        with pytest.raises(KeyboardInterrupt):
            convert(corpus)
    assert (corpus.output / ".RefCOCO_val.tsv.part").stat().st_size > 1000
    corpus.images[0]["caption"] = "changed"
    convert(corpus)
    assert [row["question"] for row in read_rows(corpus.output / "RefCOCO_val.tsv")][:2] == ["changed", "thing 1"]


def _stop(self: PartialTsv, report: dict[str, Any]) -> dict[str, Any]:
    raise KeyboardInterrupt


def test_skipped_images_are_counted_again_after_an_interruption(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    truncate(corpus.pictures / corpus.file_name(0))
    with monkeypatch.context() as patch:
        patch.setattr(PartialTsv, "finish", _stop)
        with pytest.raises(KeyboardInterrupt):
            convert(corpus, skip_bad=True)
    reads.clear()
    report = convert(corpus, skip_bad=True)
    assert reads == [corpus.file_name(0)]
    assert [entry["index"] for entry in report["skipped_entries"]] == ["1000", "1003"]
    assert [row["index"] for row in read_rows(corpus.output / "RefCOCO_val.tsv")] == [1001, 1002, 1004, 1005]


def test_two_conversions_do_not_write_one_file(corpus: Corpus) -> None:
    corpus.output.mkdir()
    with (
        PartialTsv(corpus.output / "RefCOCO_val.tsv", "x"),
        pytest.raises(ConversionError, match="another conversion is writing"),
    ):
        convert(corpus)


@pytest.mark.parametrize("call", [1, 3, 4], ids=["note", "table", "report"])
def test_a_full_disk_is_said_and_leaves_nothing(call: int, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="free some space"):
        convert(corpus)
    assert names(corpus.output) == []
