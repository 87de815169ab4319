"""A bench that is cut keeps what it measured, and goes on behind it: the calls themselves, on a real small model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.lab import gpu
from ivcp_eval.lab.bench import fork, kept, pruning, selection, throughput

SMALL = ["--size", "tiny", "--threads", "1", "--rounds", "2"]
#: Bench -> its function that measures one call, and options.
BENCHES: dict[str, tuple[Any, Any, str, list[str]]] = {
    "pruning": (pruning.main, pruning, "_run_once", ["--batch", "1", "--methods"]),
    "selection": (pruning.main, selection, "_run_once", ["--only-methods", "--methods", "fastv", "random", "pool"]),
    "throughput": (throughput.main, throughput, "answer", ["--concurrency", "2", "--new-tokens", "2", "--each", "2"]),
}


@contextmanager
def counted(module: Any, name: str, most: int = 999) -> Iterator[list[int]]:
    """Counts the calls of a bench, which ends before it makes one more than ``most``."""
    real, calls = getattr(module, name), list[int]()

    def call(*args: Any, **options: Any) -> Any:
        if len(calls) == most:
            raise Cut
        calls.append(1)
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        yield calls


class Cut(BaseException):
    """Nothing in a bench catches it, as nothing catches a process that is killed."""


def _calls(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in out.with_name(f"{out.name}.calls.jsonl").read_text().splitlines()]
    return [line for line in lines if "call" in line]


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_that_is_cut_goes_on(name: str, tmp_path: Path) -> None:
    main, module, function, options = BENCHES[name]
    options, out = [*SMALL, *options, "--resume", "--out", str(tmp_path / "cut")], tmp_path / "cut"
    with counted(module, function, 5), pytest.raises(Cut):
        main(options)
    before = _calls(out)
    assert len(before) >= 2, "warm-ups aside"
    with counted(module, function) as calls:
        assert main(options) == 0
    after = _calls(out)
    assert after[: len(before)] == before
    assert len({(line["cell"], line["call"], line["round"]) for line in after}) == len(after), "nothing twice"
    fresh = [line for line in after[len(before) :] if "vision" not in line["cell"]]
    assert len(calls) == len(fresh) + len({(line["cell"], line["call"]) for line in fresh}), "each once to warm up"
    rows = json.loads((tmp_path / "cut.json").read_text())["rows"]
    assert all(row["rounds"] == (1 if row["variant"] == "vision encoder" else 2) for row in rows)
    with counted(module, function) as calls:
        assert main(options) == 0
    assert (calls, _calls(out)) == ([], after)


def test_methods_that_were_measured_are_written_at_once(tmp_path: Path) -> None:
    """Not only after all methods and a whole round: a cell of many methods may never come so far."""
    out = tmp_path / "cut"
    of_none, of_fastv = 1 + 2, 3 * (1 + 2)  # a warm-up and two rounds; fastv beside the model and its cut alone
    with counted(selection, "_run_once", of_none + of_fastv + 1), pytest.raises(Cut):
        pruning.main([*SMALL, "--only-methods", "--methods", "fastv", "random", "--out", str(out)])
    rows = json.loads((tmp_path / "cut.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["none", "fastv"]
    assert [line["variant"] for line in csv.DictReader((tmp_path / "cut.csv").open())] == ["none", "fastv"]


def test_one_method_without_room_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = selection._run_once

    def crowded(setup: Any, inputs: Any, method: Any, ratio: float) -> Any:
        if method == "fastv":
            raise selection.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return real(setup, inputs, method, ratio)

    monkeypatch.setattr(selection, "_run_once", crowded)
    out = tmp_path / "made"
    assert pruning.main([*SMALL, "--only-methods", "--methods", "fastv", "random", "--out", str(out)]) == 0
    none, fastv, random = json.loads((tmp_path / "made.json").read_text())["rows"]
    assert fastv["note"] == "out of memory: CUDA out of memory. Tried to allocate 2 GiB"
    assert (none["rounds"], random["rounds"], random["variant"]) == (2, 2, "random")


def test_a_fork_that_is_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = fork.measure, list[str]()

    def measure(case: fork.Case, *args: Any) -> Any:
        if len(taken) == 2:
            raise Cut
        taken.append(case.name)
        return real(case, *args)

    options = ["--size", "tiny", "--rounds", "1", "--resume", "--out", str(tmp_path / "cut")]
    monkeypatch.setattr(fork, "measure", measure)
    with pytest.raises(Cut):
        fork.main(options)
    before = _calls(tmp_path / "cut")
    assert [line["cell"] for line in before] == [name for name in taken for _ in range(2)]
    monkeypatch.setattr(fork, "measure", real)
    assert fork.main(options) == 0
    assert _calls(tmp_path / "cut")[:4] == before
    rows = json.loads((tmp_path / "cut.json").read_text())["rows"]
    assert len(rows) == 7
    assert len(_calls(tmp_path / "cut")) == 14
    assert [row["equal"] for row in rows] == [row["variants"] for row in rows]


def test_a_line_that_was_cut_short_is_measured_again(tmp_path: Path) -> None:
    calls = kept.Calls(tmp_path / "x", {"a": 1}, resume=True)
    cell = calls.cell("c", str)
    cell["one", 0] = 2.0, "first"
    cell["two", 0] = 3.0, "second"
    path = tmp_path / "x.calls.jsonl"
    path.write_text(path.read_text()[:-7])
    cell = kept.Calls(tmp_path / "x", {"a": 1}, resume=True).cell("c", str)
    assert dict(cell) == {("one", 0): (2.0, "first")}
    cell["two", 0] = 4.0, "again"
    assert dict(kept.Calls(tmp_path / "x", {"a": 1}, resume=True).cell("c", str))["two", 0] == (4.0, "again")


def test_calls_of_other_settings_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def calls(**settings: Any) -> kept.Calls:
        return kept.Calls(tmp_path / "x", {"torch": "2", "gpu": "A", **settings}, resume=True)

    calls().cell("c", str)["one", 0] = 2.0, "first"
    assert (calls().found, calls().other) == (1, [])
    assert (calls(gpu="B").found, calls(gpu="B").other) == (0, [])
    assert calls().found == 0
    calls().cell("c", str)["one", 0] = 2.0, "first"
    assert calls(gpu="B", torch="3").other == ["torch", "gpu"]
    assert not kept.Calls(tmp_path / "x", {"torch": "3", "gpu": "B"}, resume=False).found
    options = [*SMALL, "--batch", "1", "--methods", "--resume", "--out", str(tmp_path / "told")]
    for more, said in (([], ""), ([], "goes on behind"), (["--new-tokens", "2"], "begins anew: of the calls in")):
        assert pruning.main([*options, *more]) == 0
        assert said in capsys.readouterr().out


def test_every_measuring_cell_of_a_gpu_goes_on(tmp_path: Path) -> None:
    """Whatever it measures: the limit of a cell may be shorter than what it has to do."""
    for profile in gpu.PROFILES.values():
        for cell in gpu.cells(profile, "cuda", 4, tmp_path):
            resumes = "--resume" in cell.command or "--outcomes" in cell.command or cell.paced
            assert resumes, f"{cell.name} begins anew whenever it is cut"
