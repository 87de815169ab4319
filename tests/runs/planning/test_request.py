"""Which benchmarks a request means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ivcp_eval import benchmarks, vlmeval_bridge
from ivcp_eval.interface import models
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.planning.request import Request, make_plan


def planned(*data: str) -> list[str]:
    plan = make_plan(Request(Variant("tiny"), data))
    return [benchmark.name for benchmark, _ in plan.cells]


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
    assert planned() == embedded, "the shipped model's default"
    assert planned("tiny_yes_no", "embedded") == ["tiny_yes_no", *(n for n in embedded if n != "tiny_yes_no")]


@pytest.mark.usefixtures("known")
def test_an_unknown_name_suggests_groups_too() -> None:
    with pytest.raises(ValueError, match=r"unknown benchmark or group 'matrx'; did you mean 'matrix'\?"):
        planned("matrx")


@pytest.mark.usefixtures("known")
def test_a_broken_data_file_is_not_replaced_by_vlmevalkits_own_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.yaml").write_text("kind: mcq\nmetrik: []\n")
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"broken\.yaml: unknown field 'metrik'"):
        planned("broken")


def test_full_size_models_do_not_slip_onto_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = models.find("qwen25")[1]
    monkeypatch.setattr(models, "locate", lambda *_: models.Weights(checkpoint, "qwen2_5_vl", tmp_path, "0"))
    with pytest.raises(ValueError, match=r"no CUDA device was found and qwen25 is a full-size model.*--device cpu"):
        make_plan(Request(Variant("qwen25"), ("tiny_mcq",)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"device": "gpu"}, "device 'gpu' is unknown; use cuda, cuda:1, cpu, or auto"),
        ({"device": "gpu", "elsewhere": True}, "device 'gpu' is unknown"),
        ({"min_pixels": 900, "max_pixels": 800}, "min_pixels 900 is above max_pixels 800"),
        ({"max_pixels": 100}, "min_pixels 3136 is above max_pixels 100"),
    ],
)
def test_what_no_model_can_run_with_is_refused_before_it_is_loaded(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_plan(Request(Variant("tiny"), ("tiny_mcq",), **given))
