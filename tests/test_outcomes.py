"""`--outcomes` goes on behind what passed, wherever the run before was stopped; `--family` is one family's share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = """
import os, pathlib, pytest

@pytest.mark.parametrize("family", ["a", "b"])
def test_two(family):
    pass

def test_skipped():
    pytest.skip("not here")

def test_killed():
    if not pathlib.Path("again").exists():
        os._exit(9)

def test_wrong():
    assert pathlib.Path("mended").exists(), "the reason"
"""


def run(folder: Path, *options: str) -> tuple[int, dict[str, str]]:
    """Exit code, and what stands in the file of each test: the last of its lines."""
    (folder / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.outcomes"]
    places = ["--rootdir", str(folder), "--outcomes", "found.jsonl"]
    done = subprocess.run(
        [*command, *places, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        check=False,
    )
    lines = (folder / "found.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return done.returncode, {line["test"].partition("::")[2]: line["outcome"] for line in found}


@pytest.mark.parametrize(
    "workers", [(), ("-p", "xdist", "-n", "1", "--max-worker-restart", "0")], ids=["alone", "xdist"]
)
def test_what_passed_does_not_run_again(workers: tuple[str, ...], tmp_path: Path) -> None:
    passed = {"test_two[a]": "passed", "test_two[b]": "passed", "test_skipped": "skipped"}
    code, found = run(tmp_path, *workers)
    assert code
    assert found.items() >= passed.items()
    assert found.get("test_killed") != "passed"
    with (tmp_path / "found.jsonl").open("a") as file:
        file.write('\n{"test": "cut sh')  # as a process that is killed leaves it
    (tmp_path / "again").touch()
    assert run(tmp_path, *workers) == (1, {**passed, "test_killed": "passed", "test_wrong": "failed"})
    assert "the reason" in (tmp_path / "found.jsonl").read_text()
    (tmp_path / "mended").touch()
    assert run(tmp_path, *workers)[0] == 0
    lines = (tmp_path / "found.jsonl").read_text()
    assert lines.count("test_two[a]") == 1
    assert lines.count("::test_wrong") == 2
    assert run(tmp_path, *workers)[0] == 0, "nothing is left to run"
    assert (tmp_path / "found.jsonl").read_text() == lines


def test_a_family_is_run_alone(tmp_path: Path) -> None:
    assert run(tmp_path, "--family", "b") == (0, {"test_two[b]": "passed"})
