"""`ivcp lab` reaches the tools of the embedded model; a pipe that closes early is no error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ivcp_eval.cli import main
from ivcp_eval.cli.lab.lab import TASKS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_parser(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["lab", task, "--help"])
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_an_unknown_task_is_named_with_those_there_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", *arguments]) == 2
    assert "there are train, evaluate, build-benchmarks" in capsys.readouterr().err


def test_a_task_gets_its_options_and_its_exit_code_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "build-benchmarks", "--check", "--out", str(tmp_path)]) == 1  # nothing is there
    assert "tiny_mcq.tsv" in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_is_no_error() -> None:
    # `ivcp list` into a pipe nobody reads any more, as after `| head -1`.
    command = [sys.executable, "-m", "ivcp_eval", "list", "--methods"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
