"""Gates: what is shut out is as if pruned, the gradient is that of the weights, and the model is left as it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from ivcp_eval.engine import prune
from ivcp_eval.interface import Selection, Signals, models
from ivcp_eval.interface.registry import make_method, parameters_of
from ivcp_eval.lab.tiny.scenes import scene_rng
from ivcp_eval.lab.training.command import configuration, train
from ivcp_eval.lab.training.examples import FromFile, Generated, examples_for
from ivcp_eval.lab.training.frozen import Encoded, Example, Frozen
from ivcp_eval.lab.training.gating import bounded, gated, log_gate, straight_through
from ivcp_eval.lab.training.part import part_class, part_names
from ivcp_eval.lab.training.parts._selector import Input
from ivcp_eval.lab.training.parts.visionselector import soft_top_k
from tests.engine import tiny_models


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    return Frozen(models.locate("tiny"))


@pytest.fixture(scope="module")
def example(frozen: Frozen) -> Encoded:
    return frozen.encoded(Generated("tiny", ["box"]).training(0))


def checksum(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Half(Input):
    """Every second token, for real."""

    def select(self, signals: Signals) -> Selection:
        return Selection(torch.arange(0, signals.n_visual, 2), exact=False)


def test_shut_gates_are_what_pruning_computes(frozen: Frozen, example: Encoded) -> None:
    def gate(signals: Signals) -> torch.Tensor:
        return torch.zeros(signals.n_visual).index_fill(0, torch.arange(0, signals.n_visual, 2), 1.0)

    with torch.no_grad():
        gated = frozen.logits(example, Input(), 0.5, gate)
        with prune(frozen.model, Half(), 0.5):
            out = frozen.model(**example.inputs, use_cache=False, logits_to_keep=example.labels.numel() + 1)
        untouched = frozen.logits(example)
    torch.testing.assert_close(gated, out.logits[0, :-1], atol=2e-3, rtol=0)
    assert not torch.allclose(gated, untouched, atol=0.1)


@pytest.mark.parametrize(
    ("family", "attention"), [*((name, "sdpa") for name in tiny_models.names()), ("qwen2_5_vl", "eager")]
)
def test_every_family_is_gated_as_it_is_pruned(family: str, attention: str) -> None:
    """And a token that is shut out has a gradient."""
    model, make_inputs = tiny_models.build(family, attn=attention)
    inputs = make_inputs("t5 i0 t9")
    softs: list[torch.Tensor] = []

    def gate(signals: Signals) -> torch.Tensor:
        softs.append(torch.zeros(signals.n_visual, requires_grad=True))
        return straight_through(torch.arange(0, signals.n_visual, 2), softs[-1])

    with torch.no_grad(), prune(model, Half(), 0.5):
        pruned = model(**inputs, use_cache=False).logits[:, -5:]
    with gated(model, Input(), 0.5, gate, visible=inputs["input_ids"].shape[1]):
        logits = model(**inputs, use_cache=False).logits[:, -5:]
    torch.testing.assert_close(logits, pruned, atol=1e-3, rtol=1e-3)
    (gradient,) = torch.autograd.grad(logits[..., 0].sum(), softs[0])
    assert (gradient[1::2] != 0).all()


def test_gated_states_are_those_that_enter_the_layer_of_the_cut(frozen: Frozen, example: Encoded) -> None:
    """Multiplied before the first layer that may be cut, as by hand; and the loss reaches the gates."""
    share, first = torch.full((), 0.3, requires_grad=True), frozen.session.adapter.text_model(frozen.model).layers[0]
    visual = example.inputs["input_ids"][0] == frozen.model.config.image_token_id

    def by_hand(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args[0] * torch.where(visual, 0.3, 1.0)[:, None], *args[1:]), kwargs

    handle = first.register_forward_pre_hook(by_hand, with_kwargs=True)
    try:
        with torch.no_grad():
            expected = frozen.logits(example)
    finally:
        handle.remove()
    gated = frozen.logits(example, Input(), 0.5, lambda signals: share.expand(signals.n_visual), "states")
    torch.testing.assert_close(gated, expected, atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(gated[:, 0].sum(), share)
    assert gradient != 0


def test_the_answer_is_hidden_from_the_method(frozen: Frozen, example: Encoded) -> None:
    signals = frozen.signals(example, Input(), 0.5)
    assert int(max(signals.text.max(), signals.question.max())) == example.prompt - 1


def test_a_gate_has_the_gradient_of_the_weights_it_multiplies() -> None:
    logits, values = torch.tensor([0.3, -1.0, 2.0, 0.5]).double(), torch.tensor([1.0, -2.0, 0.5, 3.0]).double()

    def multiplied(gate: torch.Tensor) -> torch.Tensor:
        weights = logits.exp() * gate
        return (weights / weights.sum()) @ values

    gate = torch.tensor([1.0, 0.0, 0.4, 0.0]).double().requires_grad_()
    ((logits + log_gate(gate)).softmax(0) @ values).backward()
    expected = torch.autograd.functional.jacobian(multiplied, gate.detach())
    torch.testing.assert_close(gate.grad, expected, atol=1e-4, rtol=1e-4)


def test_straight_through() -> None:
    soft = torch.rand(5, requires_grad=True)
    gates = straight_through(torch.tensor([1, 3]), soft)
    assert gates.tolist() == [0, 1, 0, 1, 0]
    (gates * torch.arange(5)).sum().backward()
    assert soft.grad is not None
    assert soft.grad.tolist() == [0, 1, 2, 3, 4]


def test_what_is_shut_pulls_no_harder_than_what_is_open() -> None:
    soft = torch.zeros(4, requires_grad=True)
    gates = bounded(straight_through(torch.tensor([1, 3]), soft))
    (gates * torch.tensor([1e6, -2.0, -0.5, 1.0])).sum().backward()
    assert soft.grad is not None
    assert soft.grad.tolist() == [2, -2, -0.5, 1]


def test_soft_top_k_adds_up_and_so_does_its_gradient() -> None:
    scores = torch.randn(20, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert float(soft_top_k(scores.detach(), 6).sum()) == pytest.approx(6)
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, 6), scores, atol=1e-4)


@pytest.mark.parametrize("name", part_names())
def test_the_loss_reaches_every_weight_of_a_part(name: str, frozen: Frozen, example: Encoded) -> None:
    torch.manual_seed(0)
    part = part_class(name)(frozen, configuration(name, None)["part"], example)
    taken = part.encoded(Generated("tiny", ["box"]).validation(0))
    loss, figures = part.loss(taken, np.random.default_rng(0), 0.5)
    loss.backward()
    assert all(isinstance(value, float) for value in figures.values())
    largest = {key: float(p.grad.abs().max()) for key, p in part.net.named_parameters() if p.grad is not None}
    assert max(largest.values()) > 0
    assert all(p.grad is None for p in frozen.model.parameters())


def test_a_few_steps_lower_the_loss_and_leave_the_model_alone(frozen: Frozen, tmp_path: Path) -> None:
    """On one question, so that few steps are enough; the method finds the weights, which are part of its identity."""
    before = checksum(frozen.model)
    fixed = Generated("tiny", ["box"]).training(0)
    data = tmp_path / "one.jsonl"
    fixed.parts[0]["image"].save(tmp_path / "one.png")
    row = {"image_path": "one.png", "question": fixed.parts[1]["text"], "answer": fixed.answer}
    data.write_text(f"{json.dumps(row)}\n" * 2)
    config = configuration("learnpruner", None)
    config |= {"steps": 8, "batch": 1, "rate": 0.02, "warmup": 1, "log_every": 1, "validate_every": 8, "validation": 1}
    config["part"] = {**config["part"], "ratios": [0.1]}
    weights = train("learnpruner", frozen, config, data, tmp_path / "out")
    assert weights is not None
    curve = (tmp_path / "out/curve.csv").read_text().splitlines()
    losses = [float(line.split(",")[2]) for line in curve[1:]]
    assert min(losses[-3:]) < losses[0]
    assert checksum(frozen.model) == before
    assert not frozen.model.model.language_model._forward_pre_hooks
    card = weights.with_suffix(".md").read_text()
    assert "8 (8 steps of 1)" in card
    assert "one.jsonl" in card
    method = make_method("learnpruner", {"weights": weights})
    identity = parameters_of(method)["weights"]
    assert identity.startswith("learnpruner_tiny.safetensors (sha256 ")
    with torch.inference_mode(), prune(frozen.model, method, 0.2) as run:
        frozen.model(**frozen.encoded(fixed).inputs, use_cache=False)
    assert run.visual_kept[0] == round(0.2 * run.visual_prompt[0])


def test_training_scenes_are_no_test_scenes() -> None:
    example = Generated("tiny2", ["box", "list"]).training(5)
    assert example == Generated("tiny2", ["box", "list"]).training(5)
    assert example.parts[0]["image"] != Generated("tiny2", ["box", "list"]).validation(5).parts[0]["image"]
    assert scene_rng("train", 5).integers(1 << 40) != scene_rng("test", 5).integers(1 << 40)


def test_a_clip_asks_about_one_of_its_scenes() -> None:
    video, question = Generated("tiny2", ["clip"]).training(0).parts
    assert video["video"].shape == (8, 128, 128, 3)
    assert (video["video"][0] == video["video"][1]).all()
    assert not (video["video"][1] == video["video"][2]).all()
    assert question["text"].startswith("What colour is the ")


def test_a_file_of_questions(frozen: Frozen, tmp_path: Path) -> None:
    """Every tenth is held out, a pass sees each of the others once, and what has no answer gets the model's."""
    Picture.new("RGB", (112, 112)).save(tmp_path / "black.png")
    rows = [f'{{"image_path": "black.png", "question": "How many {i}?", "answer": "{i}"}}' for i in range(12)]
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(rows))
    found = examples_for(frozen, data, [], seed=1)
    assert isinstance(found, FromFile)
    asked = [found.training(number).answer for number in range(20)]
    assert sorted(asked[:10], key=int) == sorted(asked[10:], key=int) == [str(i) for i in (*range(1, 10), 11)]
    assert asked[:10] != asked[10:]
    assert [found.validation(number).answer for number in range(3)] == ["0", "10", "0"]
    data.write_text('{"image_path": "black.png", "question": "What colour is the square?"}\n' * 2)
    open_ended = examples_for(frozen, data, [], seed=1).training(0)
    assert open_ended == Example(open_ended.parts, frozen.own_answer(open_ended.parts))
    data.write_text(rows[0])
    with pytest.raises(ValueError, match="holds one question"):
        examples_for(frozen, data, [], seed=1)
