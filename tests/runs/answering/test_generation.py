"""A checkpoint's generation_config.json changes no answer, and weights or logits that are no numbers give none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ivcp_eval.interface import models
from ivcp_eval.interface.registry import adapter, family_names
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.generation import NonFiniteLogits, finite_logits
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement
from tests.runs.conftest import Lab

HARM = {
    "do_sample": True,
    "temperature": 1e-06,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 20,
    "suppress_tokens": list(range(3, 60)),
    "num_beams": 2,
    "renormalize_logits": True,
}


def _session(folder: Path) -> Session:
    return Session(models.locate("tiny", folder), Placement("cpu").resolve(), Limits(4 * 28 * 28, 1024 * 28 * 28, 24))


def _answers(folder: Path) -> list[str]:
    parts = [{"image": Image.new("RGB", (112, 84), "red")}, {"text": "What colour is it?"}]
    variants = [Variant("tiny", "none", 1.0), Variant("tiny", "random", 0.5)]
    session = _session(folder)
    return [
        *(session.answer(parts, variant).prediction for variant in variants),
        *(answer.prediction for answer in session.answer_all(parts, variants)),
    ]


@pytest.fixture
def copy(random_model: Path, tmp_path: Path) -> Path:
    """The random model, to be harmed."""
    return Path(shutil.copytree(random_model, tmp_path / "copy"))


def test_the_checkpoints_generation_config_changes_nothing(random_model: Path, copy: Path) -> None:
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | HARM))
    assert _answers(copy) == _answers(random_model)


@pytest.mark.parametrize("family", family_names())
def test_every_family_states_its_generation(family: str) -> None:
    stated = adapter(family).stated()
    assert stated["do_sample"] is False
    assert stated["repetition_penalty"] == 1.0
    assert "max_new_tokens" not in stated


def test_it_is_part_of_the_cell(lab: Lab) -> None:
    assert lab.eval("--method", "random", "--ratio", "0.5", "--data", "tiny_yes_no", "--limit", "2") == 0
    noted = json.loads(next((lab.folder / "runs").rglob("cell.json")).read_text())["identity"]
    assert noted["generation"] == {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }


def _change(folder: Path, change: object) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, file, metadata={"format": "pt"})


def test_weights_that_are_missing_are_refused_by_name(copy: Path) -> None:
    def without_attention(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.self_attn" in name]:
            del tensors[name]

    _change(copy, without_attention)
    with pytest.raises(ValueError, match=r"missing .*layers\.1\.self_attn\.k_proj"):
        _session(copy)


def test_weights_of_another_shape_or_name_are_refused_by_name(copy: Path) -> None:
    def other(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "layers.1.mlp.down_proj.weight" in name)
        tensors[name] = tensors[name][:, :-1].contiguous()
        tensors["model.surplus.weight"] = torch.zeros(2)

    _change(copy, other)
    with pytest.raises(ValueError, match=r"unknown to the model: .*surplus.*of another shape: .*down_proj"):
        _session(copy)


def test_weights_that_are_nan_are_refused_by_name(copy: Path) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> None:
        next(t for n, t in tensors.items() if "layers.1.mlp.down_proj.weight" in n)[0, 0] = float("nan")

    _change(copy, broken)
    with pytest.raises(ValueError, match=r"NaN or infinite .*layers\.1\.mlp\.down_proj"):
        _session(copy)


def test_logits_that_are_nan_give_no_answer(random_model: Path) -> None:
    session = _session(random_model)
    session.model.lm_head.register_forward_hook(lambda _m, _a, out: out * float("nan"))
    parts = [{"image": Image.new("RGB", (112, 84), "red")}, {"text": "What colour is it?"}]
    with pytest.raises(NonFiniteLogits, match="NaN or infinite"):
        session.answer(parts, Variant("tiny", "none", 1.0))
    with pytest.raises(NonFiniteLogits, match="NaN or infinite"):
        session.answer_all(parts, [Variant("tiny", "none", 1.0), Variant("tiny", "random", 0.5)])


def test_minus_infinity_forbids_a_token_and_is_fine() -> None:
    scores = torch.tensor([[0.0, float("-inf")]])
    ids = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(finite_logits()(ids, scores), scores)  # type: ignore[arg-type]
