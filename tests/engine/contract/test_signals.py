"""What a method is shown is what the unpruned model computes, for each row of a padded batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.interface import Cut, ModelFacts, Signal, Signals, Step, registry
from tests.engine import tiny_models
from tests.engine.contract.cases import RAGGED, Case
from tests.engine.contract.checks import close
from tests.engine.contract.toys import Toy

LAYER = 3


@dataclass(frozen=True)
class Curious(Toy):
    """Asks for everything of the decoder."""

    needs: ClassVar[frozenset[Signal]] = frozenset({"value", "key", "query"})

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return (Cut(LAYER, ratio),)

    def score(self, signals: Signals) -> Tensor:
        rows = torch.arange(signals.hidden.shape[0], device=signals.visual.device)
        signals.memory |= {"last": signals.attention(rows), "entering": signals.attention(rows, entering=True)}
        signals.memory["rope"] = signals.rope()
        assert signals.project is not None
        assert signals.normed is not None
        signals.memory |= {name: signals.project(name) for name in ("query", "key")}
        signals.memory["normed"] = signals.normed()
        signals.memory["seen"] = signals
        return super().score(signals)


def look(case: Case, inputs: dict[str, Any]) -> list[Signals]:
    """The signals of every row with an image."""
    method, seen = Curious(), []
    select = method.select
    object.__setattr__(method, "select", lambda signals: (seen.append(signals), select(signals))[1])
    with ivcp_eval.prune(case.model, method, 0.5):
        case.forward(inputs)
    return seen


@pytest.fixture(params=tiny_models.names())
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, "none", attn="eager")


def test_signals_are_the_unpruned_models(case: Case) -> None:
    """Hidden states, attention of two layers, and the projections, against the stock model's own outputs."""
    inputs = case.inputs(*RAGGED)
    projected: dict[str, Tensor] = {}
    layer = case.text_model.layers[LAYER - 1]
    handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: projected.update(mixed=args[0]))
    try:
        plain = case.forward(inputs, output_attentions=True, output_hidden_states=True, use_cache=False)
    finally:
        handle.remove()
    seen = look(case, inputs)
    assert len(seen) == 2  # the third row has no image
    for row, signals in enumerate(seen):
        alive = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row][alive]
        assert torch.equal(signals.visual, (ids == case.image_token).nonzero().flatten())
        assert torch.equal(signals.text, (ids != case.image_token).nonzero().flatten())
        assert [int(image.tokens.numel()) for image in signals.images] == case.image_sizes(RAGGED[row])
        assert torch.cat([image.tokens for image in signals.images]).tolist() == list(range(signals.n_visual))
        close(signals.hidden, plain.hidden_states[LAYER][row, alive], "hidden states entering the cut", 1e-5)
        for name, index in (("last", LAYER - 1), ("entering", LAYER)):
            attention = plain.attentions[index][row][:, alive][:, :, alive]
            close(signals.memory[name], attention, f"attention of layer {index}", 1e-5)
        # Attention times values is what the output projection gets.
        value = signals.value
        assert value is not None
        heads = signals.memory["last"].shape[0]
        mixed = signals.memory["last"] @ value.repeat_interleave(heads // value.shape[0], dim=0).float()
        close(mixed.transpose(0, 1).flatten(1), projected["mixed"][row, alive], "values", 1e-4)
        assert signals.ids is not None
        assert torch.equal(signals.ids, ids)
        assert signals.cut == Cut(LAYER, 0.5)
        states = plain.hidden_states[LAYER][row, alive]
        close(signals.memory["normed"], case.text_model.norm(states), "states after the final norm", 1e-5)


@dataclass(frozen=True)
class Watching(Toy):
    """Removes nothing, and looks at what every step pays attention to."""

    needs: ClassVar[frozenset[Signal]] = frozenset({"step"})

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return ()

    def attended(self, step: Step) -> None:
        if step.layer == LAYER:
            step.memory.setdefault("seen", []).append(step.attention())


def test_attention_of_a_step_is_the_unpruned_models(case: Case) -> None:
    """Beside all text, that of the answer too, and none of the padding."""
    if case.family == "deepseek_vl2":
        pytest.skip("its cache holds no keys")
    inputs = case.inputs(*RAGGED)
    plain = case.generate(inputs, 4, output_attentions=True).attentions[1:]
    seen: dict[int, dict[str, Any]] = {}
    method = Watching()
    attend = method.attended
    object.__setattr__(method, "attended", lambda step: (seen.update({id(step.memory): step.memory}), attend(step))[1])
    with ivcp_eval.prune(case.model, method, 0.5):
        case.generate(inputs, 4)
    assert len(seen) == 2
    for row, memory in enumerate(seen.values()):
        visual = (inputs["input_ids"][row] == case.image_token).nonzero().flatten()
        assert len(memory["seen"]) == len(plain) == 3
        for attention, layers in zip(memory["seen"], plain, strict=True):
            close(attention, layers[LAYER - 1][row, :, -1, visual], "attention of a step", 1e-5)


def test_projections_are_those_of_the_layer_that_is_entered(case: Case) -> None:
    """What the layer itself projects, heard at its own modules in an unpruned forward."""
    inputs, adapter, heard = case.inputs(*RAGGED), registry.adapter(case.family), {}
    layer = case.text_model.layers[LAYER]
    hooks = []
    for name in ("query", "key"):
        module, heads = adapter.projection(layer, name)
        hooks.append(module.register_forward_hook(lambda _m, _a, out, n=name, h=heads: heard.update({n: h(out)})))
    try:
        case.forward(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for row, signals in enumerate(look(case, inputs)):
        alive = inputs["attention_mask"][row].bool()
        for name, states in heard.items():
            close(signals.memory[name], states[row][:, alive], f"{name} of the layer that is entered", 1e-4)


def test_rotary_spectrum(case: Case) -> None:
    """cos and sin of every axis: angle = position x frequency, positions as the rotary embedding gets them."""
    inputs = case.inputs(*RAGGED)
    positions: list[Tensor] = []
    hook = case.text_model.rotary_emb.register_forward_pre_hook(
        lambda _m, args, kwargs: positions.append(kwargs.get("position_ids", args[-1] if args else None)),
        with_kwargs=True,
    )
    try:
        seen = look(case, inputs)
    finally:
        hook.remove()
    # The first block on a model also runs the engine's own test, on a prompt of another length.
    given = next(ids for ids in positions if ids.shape[-1] == inputs["input_ids"].shape[1])
    ids = given if given.ndim == 3 else given[None]
    frequencies = case.text_model.rotary_emb.inv_freq
    for row, signals in enumerate(seen):
        cos, sin = signals.memory["rope"]
        columns = inputs["attention_mask"][row].bool().nonzero().flatten()
        n = frequencies.numel()
        for axis in range(ids.shape[0]):
            angles = ids[axis, min(row, ids.shape[1] - 1), columns].float()[:, None] * frequencies
            for half in (slice(0, n), slice(n, 2 * n)):
                close(cos[axis][:, half], angles.cos(), "cos", 1e-6)
                close(sin[axis][:, half], angles.sin(), "sin", 1e-6)
        assert cos.shape == (ids.shape[0], columns.numel(), 2 * n)


def test_question_is_the_text_after_the_last_image(case: Case) -> None:
    closing = registry.adapter(case.family).closing_tokens
    for layout, wanted in (("t4 i0 t3 i0 t6", 6), ("t4 i0 t1", 1)):
        (signals,) = look(case, case.inputs(layout))
        n = signals.hidden.shape[0]
        assert signals.question.tolist() == list(range(n - wanted, n)), f"{closing} closing tokens"
    inputs = case.inputs("t4 i0")
    if int(inputs["input_ids"][0, -1]) != case.image_token:  # only the closing marker follows
        (signals,) = look(case, inputs)
        assert torch.equal(signals.question, signals.text)


def test_value_shapes(case: Case) -> None:
    (signals,) = look(case, case.inputs("t4 i0 t3"))
    n = signals.hidden.shape[0]
    assert signals.query is not None
    assert signals.key is not None
    assert signals.value is not None
    for states in (signals.query, signals.key, signals.value):
        assert states.ndim == 3
        assert states.shape[1] == n
    assert signals.query.shape[0] % signals.key.shape[0] == 0
    assert signals.query.shape[2] == signals.key.shape[2]
    assert signals.family == case.family
    assert signals.stage == 0
