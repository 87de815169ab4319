"""A model with a compressor in its tower: from the command to an answer, and what its training compares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ivcp_eval.interface import models
from ivcp_eval.interface.variants import Variant
from ivcp_eval.lab.training.command import configuration, train
from ivcp_eval.lab.training.examples import Generated
from ivcp_eval.lab.training.frozen import Example, Frozen
from ivcp_eval.lab.training.parts.uhd_v4 import Part, pooled
from ivcp_eval.runs.planning.placement import Placement

SHORT = {"steps": 2, "batch": 1, "log_every": 1, "validate_every": 2, "validation": 1, "kinds": ["box"]}


@pytest.fixture(scope="module")
def part(frozen: Frozen) -> Part:
    options = configuration("uhd_v4", None)["part"]
    return Part(frozen, options, frozen.encoded(Generated("tiny", ["box"]).training(0)))


def test_trained_on_a_file_it_answers_with_a_fourth_of_the_tokens(frozen: Frozen, tmp_path: Path) -> None:
    """A file of pictures whose sides are no whole tokens; the rest of the model stays, to the bit."""
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}
    data, out = tmp_path / "mine.jsonl", tmp_path / "out"
    lines = []
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 255, (100, 130, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image_path": f"{number}.png", "question": "What colour?", "answer": "red"}))
    data.write_text("\n".join(lines))
    config = {**configuration("uhd_v4", None), **SHORT}
    assert train("uhd_v4", frozen, config, data, out) is not None
    assert all(torch.equal(value, before[name]) for name, value in frozen.model.state_dict().items())

    made, base = load_file(out / "model" / "model.safetensors"), before
    trained = load_file(out / "uhd_v4_tiny.safetensors")
    assert any(not torch.equal(value, base[name].to(value.dtype)) for name, value in made.items() if "merger" in name)
    same = [name for name in made if "embed" in name or name.endswith("visual.blocks.0.attn.qkv.weight")]
    assert len(same) == 3
    assert all(torch.equal(made[name], base[name].to(made[name].dtype)) for name in same)
    assert {name.split(".")[0] for name in trained} == {"compressor", "blocks", "merger", "decoder"}

    small = Frozen(models.locate("uhd_v4", out / "model"), Placement("cpu", "float32", "sdpa"))
    parts = ({"image": Image.new("RGB", (224, 224))}, {"text": "What colour?"})
    whole, few = (model.session.answer(parts, Variant("", "none", 1.0)) for model in (frozen, small))
    assert (whole.visual_tokens, few.visual_tokens) == (64, 16)
    assert small.session.answer(parts, Variant("", "uniform", 0.5)).visual_kept == 8


def test_both_models_see_the_same_pixels(part: Part) -> None:
    """A picture that the whole model alone would take as 84 x 140 pixels, at the size that the small one needs."""
    noise = np.random.default_rng(0).integers(0, 255, (86, 150, 3), dtype=np.uint8)
    pair = part.encoded(Example(({"image": Image.fromarray(noise)}, {"text": "?"}), "red"))
    teacher, student = (side.inputs for side in (pair.teacher, pair.student))
    assert teacher["image_grid_thw"].tolist() == student["image_grid_thw"].tolist() == [[1, 8, 12]]
    assert torch.equal(teacher["pixel_values"].sort(0).values, student["pixel_values"].sort(0).values)
    with pytest.raises(ValueError, match="trained on pictures; this example holds a video"):
        part.encoded(Example(({"video": np.zeros((2, 8, 8, 3))},), "red"))


def test_untrained_tokens_are_near_the_means_and_training_brings_them_nearer(part: Part) -> None:
    pair = part.encoded(Generated("tiny", ["box"]).validation(0))
    rng = np.random.default_rng(0)
    first, figures = part.loss(pair, rng, 0.0)
    assert set(figures) == {"features", "answer", "teacher"}
    assert figures["features"] < 0.5  # of the variance of the means; tokens that know nothing have 1 at least
    before = {name: value.clone() for name, value in part.net.state_dict().items()}
    optimizer = torch.optim.SGD(part.groups(), lr=0.001)
    for _ in range(3):
        loss, _ = part.loss(pair, rng, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert part.loss(pair, rng, 0.0)[0].item() < first.item()
    part.net.load_state_dict(before)


def test_in_half_precision_the_trained_weights_are_whole() -> None:
    """Small steps are lost in bfloat16; every trained weight gets a gradient, but those that a scale of 0 hides."""
    half = Frozen(models.locate("tiny"), Placement("cpu", "bfloat16", "sdpa"))
    example = Generated("tiny", ["box"]).training(0)
    part = Part(half, configuration("uhd_v4", None)["part"], half.encoded(example))
    part.loss(part.encoded(example), np.random.default_rng(0), 0.0)[0].backward()
    assert {parameter.dtype for parameter in part.net.parameters()} == {torch.float32}
    still = {name for name, parameter in part.net.named_parameters() if not parameter.grad.any()}  # type: ignore[union-attr]
    hidden = {name for name, _ in part.net.named_parameters() if name.startswith("compressor.") and "scale" not in name}
    assert still == hidden
    others = [parameter for name, parameter in part.student.model.named_parameters() if parameter.grad is None]
    assert others
    assert all(parameter.dtype == torch.bfloat16 for parameter in others)


def test_means_of_visual_tokens(frozen: Frozen) -> None:
    """Of a picture of 2 x 4 visual tokens and one of 2 x 2."""
    features = torch.arange(12.0)[:, None]
    grids = torch.tensor([[1, 4, 8], [1, 4, 4]])
    wanted = [(0 + 1 + 4 + 5) / 4, (2 + 3 + 6 + 7) / 4, (8 + 9 + 10 + 11) / 4]
    assert pooled(features, grids, frozen).flatten().tolist() == wanted


def test_only_the_family_that_it_is_made_of(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen.model.config, "model_type", "llava")
    with pytest.raises(ValueError, match=r"made of a model of the family qwen2_5_vl .*; tiny is of llava"):
        Part(frozen, configuration("uhd_v4", None)["part"], None)  # type: ignore[arg-type]
