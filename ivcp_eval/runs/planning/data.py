"""A benchmark's file on this machine: where it is, its checksum and rows. Only `fetch_missing` asks the network."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from ivcp_eval import benchmarks, vlmeval_bridge
from ivcp_eval.benchmarks import OWN, Benchmark, DataMissing
from ivcp_eval.files import file_digest, long_cells, remembered
from ivcp_eval.vlmeval_bridge.environment import data_root, wrong_checksum


def find(name: str) -> Benchmark:
    """The declared benchmark of this name, or VLMEvalKit's own data set."""
    if name in benchmarks.names():
        return benchmarks.load(name)
    return dataclasses.replace(benchmarks.undeclared(name), md5=vlmeval_bridge.expected_md5(name))


def path_of(benchmark: Benchmark) -> Path:
    """Where the file is or belongs: beside its data file, or in VLMEvalKit's data root."""
    return benchmark.path or data_root() / f"{benchmark.vlmeval}.tsv"


def digest(benchmark: Benchmark) -> str:
    """SHA-256 of the benchmark's file, and of its video files where these are apart; each file is read whole once.

    Raises:
        DataMissing: it is not here, or is not the file whose checksum VLMEvalKit notes, which would download over it.
        ValueError: it is not the file that the declaration names.
    """
    path = path_of(benchmark)
    if not path.is_file():
        raise DataMissing(
            f"benchmark {benchmark.name!r}: the data is not here. Put {path.name} into {path.parent} (set LMUData to "
            f"use another folder), or fetch it: `ivcp data prepare {benchmark.name}`. {benchmark.source}".rstrip()
        )
    if benchmark.md5:
        md5 = remembered(path, "md5", partial(file_digest, algorithm="md5"), str)
        if md5 != benchmark.md5:
            raise DataMissing(f"benchmark {benchmark.name!r}: {wrong_checksum(path, md5, benchmark.md5)}")
    digest = remembered(path, "sha256", file_digest, str)
    if benchmark.sha256 and digest != benchmark.sha256:
        raise ValueError(
            f"{path.name} has checksum {digest[:12]}..., its data file says {benchmark.sha256[:12]}...: the file was "
            "changed or cut short. "
            + (
                "Add it again from its source (`ivcp data add`)."
                if benchmark.group == OWN
                else "Restore it (git checkout), or correct sha256 if the change is meant."
            )
        )
    return benchmarks.content_digest(benchmark, path)


def rows(benchmark: Benchmark, limit: int | None) -> int:
    """Rows of a benchmark's file, which is here, up to ``limit``; raises ValueError for one that is no text."""
    n = remembered(path_of(benchmark), "rows", _count, int)
    return min(n, limit) if limit else n


def _count(path: Path) -> int:
    n = 0
    try:
        with path.open(encoding="utf-8", newline="") as stream, long_cells():
            for _ in csv.reader(stream, delimiter="\t"):
                n += 1
        return max(0, n - 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, {_not_utf8(path)}; save the file as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path}, row {n}: not a TSV file ({error})") from error


def _not_utf8(path: Path) -> str:
    """The first line that is no UTF-8 text, and its byte: what reads ahead does not know the line."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}: byte 0x{line[error.start]:02x} is not UTF-8 text"
    return "not UTF-8 text"


def fetch_missing(names: Iterable[str], say: Callable[[str], None]) -> None:
    """Have VLMEvalKit fetch the files that are not here; why one cannot be had is said, and is for the plan to report.

    A file that is here is never replaced.
    """
    missing = [benchmark for benchmark in map(find, dict.fromkeys(names)) if not path_of(benchmark).is_file()]
    if not missing:
        return
    from ivcp_eval.vlmeval_bridge import register

    register()
    from ivcp_eval.vlmeval_bridge.evaluate import build  # not before VLMEvalKit was imported as `register` does it

    for benchmark in missing:
        say(f"{benchmark.name}: {path_of(benchmark)} is not here; asking VLMEvalKit for it")
        try:
            build(benchmark, None)
        except (DataMissing, ValueError, OSError) as error:
            say(str(error))
