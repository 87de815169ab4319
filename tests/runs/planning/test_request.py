"""Which benchmarks a request means, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivcp_eval import benchmarks, vlmeval_bridge
from ivcp_eval.cli import main
from ivcp_eval.interface import models
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.plan import RunPlan, make
from ivcp_eval.runs.planning.spec import SpecError, check


def plan(model: str, *data: str, **options: Any) -> RunPlan:
    plan_only = options.pop("plan_only", False)
    raw = {"models": [model], "benchmarks": list(data), "methods": [{"method": "none"}], **options}
    return make(check(raw, "test"), plan_only=plan_only)


def planned(*data: str) -> list[str]:
    return [benchmark.name for _, benchmark, _ in plan("tiny", *data).cells()]


def test_every_benchmark_is_in_one_group() -> None:
    groups = benchmarks.groups()
    assert len(groups["matrix"]) == 20
    members = [(name, group) for group, names in groups.items() for name in names]
    assert sorted(members) == sorted((name, benchmarks.load(name).group) for name in benchmarks.names())


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLMEvalKit knows one data set (importing it takes ten seconds)."""
    monkeypatch.setattr(vlmeval_bridge, "knows", lambda name: name == "broken")


def test_groups_and_names_each_once() -> None:
    embedded = list(benchmarks.names("embedded"))
    assert planned("embedded") == embedded
    assert planned("tiny_yes_no", "embedded") == ["tiny_yes_no", *(n for n in embedded if n != "tiny_yes_no")]


@pytest.mark.usefixtures("known")
def test_an_unknown_name_suggests_groups_too() -> None:
    with pytest.raises(SpecError, match=r"unknown benchmark or group 'matrx'; did you mean 'matrix'\?"):
        planned("matrx")


@pytest.mark.usefixtures("known")
def test_a_broken_data_file_is_not_replaced_by_vlmevalkits_own_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.yaml").write_text("kind: mcq\nmetrik: []\n")
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"broken\.yaml, line 2: unknown key 'metrik'"):
        planned("broken")


@pytest.mark.usefixtures("known")
def test_a_file_that_is_no_utf8_is_said_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("right", "latin"):
        (tmp_path / f"{name}.yaml").write_text(f"kind: short_answer\nprompt: dataset\nfile: {name}.tsv\n")
        (tmp_path / f"{name}.tsv").write_bytes("index\tquestion\tanswer\n0\tcaf\xe9?\tred\n".encode("latin-1"))
    (tmp_path / "right.tsv").write_text("index\tquestion\tanswer\n0\tcafé?\tred\n")
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    made = plan("tiny", "latin", "right")
    assert [benchmark.name for _, benchmark, _ in made.cells()] == ["right"]
    assert len(made.units()) == 1
    (problem,) = made.problems
    assert f"{tmp_path / 'latin.tsv'}, line 2: byte 0xe9 is not UTF-8 text; save the file as UTF-8" in problem


def test_full_size_models_do_not_slip_onto_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = models.find("qwen25")[1]
    found = models.Weights(checkpoint, "qwen2_5_vl", tmp_path, "0")
    monkeypatch.setattr(models, "locate", lambda *_, **__: found)
    (problem,) = plan("qwen25", "tiny_mcq").problems
    assert "no CUDA device was found and qwen25 is a full-size model" in problem
    assert "--device cpu" in problem


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "device 'gpu' is unknown; use cuda, cuda:1, cpu, or auto"),
        ({"min_pixels": 900_000_000}, "min_pixels 900000000 is above max_pixels"),
        ({"max_pixels": 100}, "min_pixels 3136 is above max_pixels 100"),
    ],
)
def test_what_no_model_can_run_with_is_refused_before_it_is_loaded(options: dict[str, Any], words: str) -> None:
    (problem,) = plan("tiny", "tiny_mcq", **options).problems
    assert words in problem


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_pixels": 900, "max_pixels": 800}, "min_pixels 900 is above max_pixels 800"),
        ({"limit": 0}, "limit must be a whole number above 0, got 0"),
        ({"limit": -4}, "limit must be a whole number above 0, got -4"),
        ({"batch": True}, "batch must be a whole number above 0, got True"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"timing": -1}, "timing must be a whole number of at least 0"),
        ({"timeout": float("inf")}, "timeout must be a finite number above 0"),
    ],
)
def test_options_say_what_is_allowed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        plan("tiny", "tiny_mcq", **options)


def test_a_layer_that_the_decoder_has_not_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Session, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    runs = str(tmp_path / "runs")
    given = ["--method", "fastv", "--set", "layer=99", "--data", "tiny_mcq", "--runs", runs, "--device", "cpu"]
    assert main(["eval", *given]) == 2
    assert "tiny__fastv__r0.5__layer=99 cannot run: layer 99 of method" in capsys.readouterr().err
    assert not list(tmp_path.rglob("journal.jsonl"))


def test_a_sweep_says_beforehand_which_variants_cannot_run() -> None:
    layers = {"method": "fastv", "ratios": [0.5], "parameters": {"layer": [2, 99]}}
    (misfit,) = plan("tiny", "tiny_mcq", methods=[layers]).misfits
    assert "layer 99 of method 'fastv' is outside" in misfit
