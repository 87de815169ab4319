"""What `ivcp data` says and fetches, with files and a server of the test's own."""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.cli.setup import data

needs_vlmeval = pytest.mark.skipif(importlib.util.find_spec("vlmeval") is None, reason="VLMEvalKit fetches")


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    parser.set_defaults(quiet=False)
    return data.run(parser.parse_args(list(words)))


@pytest.mark.parametrize("name", [name for name in benchmarks.names() if benchmarks.load(name).group != "own"])
def test_every_declared_file_has_a_state_and_an_advice(tmp_path: Path, name: str):
    state = data.state_of(benchmarks.load(name), tmp_path)
    if benchmarks.load(name).file:
        assert (state.state, state.how) == ("here", "")
        assert state.checksum.startswith("sha256:")
    else:
        assert (state.state, state.size, state.path) == ("missing", None, tmp_path / f"{name}.tsv")
        by_hand = (
            "by hand: https://" if benchmarks.load(name).sampling else "ivcp lab easy-vqa"
        )  # videos; a wheel's pictures
        prepared = f"`ivcp data prepare {name}`" in state.how
        assert prepared or (by_hand in state.how and (benchmarks.load(name).sampling or name == "easy_vqa"))
        assert ("convert_to_tsv.py" in state.how) == (benchmarks.load(name).kind == "grounding")


def test_a_wrong_file_is_named(tmp_path: Path):
    benchmark = benchmarks.load("POPE")
    (tmp_path / "POPE.tsv").write_text("not POPE")
    state = data.state_of(benchmark, tmp_path)
    assert (state.state, state.size) == ("wrong checksum", 8)
    assert state.checksum == "md5:" + hashlib.md5(b"not POPE").hexdigest()
    assert benchmark.md5 in state.how
    assert data.state_of(benchmark, tmp_path, verify=False).state == "here"


def test_a_converted_set_that_is_not_whole_is_named(tmp_path: Path):
    path = tmp_path / "RefCOCO_val.tsv"
    path.write_text("x")
    report = {"complete": False, "rows": 10_830, "expected_rows": 10_834, "skipped": 4, "bytes": 1}
    of_another = json.dumps({**report, "complete": True, "bytes": 2})
    for text, said in ((json.dumps(report), "10830 of 10834"), (of_another, "not the report"), ("{", "not the report")):
        path.with_name("RefCOCO_val.tsv.report.json").write_text(text)
        state = data.state_of(benchmarks.load("RefCOCO_val"), tmp_path)
        assert state.state == "not whole"
        assert said in state.how


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "300")  # so that paths are not broken
    assert run("MME", "RefCOCO_val", "--root", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "MME.tsv") in out
    assert "fetches https://opencompass.openxlab.space/utils/VLMEval/MME.tsv" in out
    assert run("matrix", "--root", str(tmp_path), "--quick") == 0
    assert capsys.readouterr().out.count("missing") == 20
    assert run("--root", str(tmp_path), "--quick") == 0
    assert capsys.readouterr().out.count("matrix ") == 20


def test_bad_words(tmp_path: Path):
    with pytest.raises(ValueError, match="did you mean 'POPE'"):
        run("POPPE", "--root", str(tmp_path))
    with pytest.raises(ValueError, match="name what to prepare"):
        run("prepare", "--root", str(tmp_path))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which a server gives its files."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "shelf"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@needs_vlmeval
def test_prepare_fetches_what_is_missing_and_right(shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, address = shelf
    (folder / "A.tsv").write_bytes(b"index\timage\n")
    md5 = hashlib.md5(b"index\timage\n").hexdigest()
    declared = {
        "A": Benchmark("A", vlmeval="A", url=f"{address}/A.tsv", md5=md5),
        "B": Benchmark("B", vlmeval="B", url=f"{address}/A.tsv", md5="0" * 32),
        "C": Benchmark("C", vlmeval="C", url=f"{address}/nowhere.tsv", md5=md5),
        "D": Benchmark("D", vlmeval="D", source="ask its authors"),
        "E": Benchmark("E", vlmeval="E", url=f"{address}/A.tsv", md5=md5),
    }
    monkeypatch.setattr(data, "chosen", lambda names: [declared[name] for name in names])
    root = tmp_path / "LMUData"
    root.mkdir()
    (root / "E.tsv").write_text("the user's own")
    states = {state.benchmark.name: state for state in data.prepare(list("ABCDE"), root)}
    assert {name: state.state for name, state in states.items()} == {
        **dict.fromkeys("BCD", "missing"), "A": "here", "E": "wrong checksum"
    }  # fmt: skip
    assert f"gave a file with MD5 {md5}" in states["B"].how
    assert f"put it at {root / 'C.tsv'}" in states["C"].how
    assert states["D"].how == "by hand: ask its authors"
    assert (root / "E.tsv").read_text() == "the user's own"
    assert sorted(path.name for path in root.iterdir()) == ["A.tsv", "E.tsv"], "no stump of a download is left"
    assert (root / "A.tsv").read_bytes() == b"index\timage\n"


@needs_vlmeval
def test_prepare_says_what_it_could_not_get(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    from ivcp_eval.vlmeval_bridge import environment

    monkeypatch.setattr(environment, "download", lambda url, path: "URLError: no network")
    assert run("prepare", "POPE", "RefCOCO_val", "tiny_mcq", "--root", str(tmp_path)) == 1
    out = " ".join(capsys.readouterr().out.split())  # lines fold
    assert f"POPE.tsv could not be fetched (URLError: no network); fetch it by hand and put it at {tmp_path}" in out
    assert f"RefCOCO.tsv could not be fetched (URLError: no network); fetch it by hand and put it at {tmp_path}" in out
    assert run("prepare", "tiny_mcq", "--root", str(tmp_path)) == 0


@needs_vlmeval
def test_a_stock_grounding_file_of_the_wrong_size_is_refused(tmp_path: Path):
    (tmp_path / "RefCOCO.tsv").write_text("index\timage\tquestion\tcategory\n")
    (state,) = data.prepare(["RefCOCO_val"], tmp_path)
    assert state.state == "missing"
    assert state.how
    assert not list(tmp_path.glob("RefCOCO_*"))


def test_advice_folds_and_addresses_stay_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--quick", "--root", "/none") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "https://" not in line) <= 80
    assert any("https://opencompass.openxlab.space/utils/benchmarks/SEEDBench/SEEDBench_IMG.tsv" in x for x in lines)
