"""`ivcp lab` reaches the tools of the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivcp_eval.cli import main
from ivcp_eval.cli.lab.lab import TASKS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("task", "model"), [(task, model) for task, (models, _) in TASKS.items() for model in models])
def test_every_task_has_a_parser(task: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["lab", task, model, "--help"])
    assert end.value.code == 0
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.startswith((f"usage: ivcp lab {task} [", f"usage: ivcp lab {task} {model} ["))


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_an_unknown_task_is_named_with_those_there_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", *arguments]) == 2
    assert "there are train, evaluate, accept" in capsys.readouterr().err


def test_a_task_that_is_not_for_the_model_says_for_which_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "accept", "tiny"]) == 2
    assert "ivcp lab accept is for tiny2, got 'tiny'" in capsys.readouterr().err


def test_a_task_gets_its_options_and_its_exit_code_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "build-benchmarks", "--check", "--out", str(tmp_path)]) == 1  # nothing is there
    assert "tiny_mcq.tsv" in capsys.readouterr().err
