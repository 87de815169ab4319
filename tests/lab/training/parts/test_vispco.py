"""VisPCO's search: its step over layers, its FLOPs, gradients of both of its numbers, and budgets that are met."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ivcp_eval.lab.training.frozen import Encoded, Frozen
from ivcp_eval.lab.training.part import default_config
from ivcp_eval.lab.training.parts.vispco import EveryLayer, Part, Planner, added_flops, keeps, shares

OPTIONS: dict[str, Any] = yaml.safe_load(default_config("vispco").read_text())["part"]


def test_layers_before_k_keep_all_and_those_behind_r() -> None:
    kept = shares(torch.tensor(2.5), torch.tensor(0.2), 6, 0)
    assert kept.tolist() == pytest.approx([1, 1, 0.995, 0.205, 0.2, 0.2], abs=1e-3)
    assert shares(torch.tensor(0.0), torch.tensor(0.2), 3, 0)[0] == 1  # nothing can prune the first


def test_flops_are_shares_of_what_visual_tokens_add(frozen: Frozen) -> None:
    shape, layers = frozen.session.shape, frozen.session.shape.layers
    assert added_flops(torch.ones(layers), shape, 150, 30) == pytest.approx(1)
    assert added_flops(torch.zeros(layers), shape, 150, 30) == pytest.approx(0)
    kept = [0.5] * layers
    text, part, whole = (shape.prefill_flops([n] * layers) for n in (30, 105, 180))
    assert added_flops(torch.tensor(kept), shape, 150, 30) == pytest.approx((part - text) / (whole - text))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_threshold_keeps_about_the_share_and_lets_the_gradient_through(share: float) -> None:
    score = torch.linspace(0.01, 1, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    wanted = torch.tensor(share, requires_grad=True)
    gates = keeps(score, wanted)
    assert gates.tolist() == pytest.approx(gates.round().tolist())
    assert float(gates.detach().mean()) == pytest.approx(share, abs=0.02)
    kept = gates.detach().round().bool()
    assert float(score[kept].min()) > float(score[~kept].max())
    gates.sum().backward()
    assert wanted.grad is not None
    assert wanted.grad > 0  # a larger share lowers the threshold


def test_gradients_reach_every_weight_and_both_numbers(frozen: Frozen, boxes: list[Encoded]) -> None:
    torch.manual_seed(0)
    part = Part(frozen, {**OPTIONS, "warm": 0}, boxes[0])
    logits, plan = part.planned(boxes[0], 0.4)
    assert all(float(g) != 0 for g in torch.autograd.grad(logits.logsumexp(-1).sum(), (plan.k, plan.r)))
    loss, figures = part.loss(boxes[0], np.random.default_rng(0), 0.0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.net.parameters())
    assert all(p.grad is None for p in frozen.model.parameters())
    assert set(figures) == {"kl", "miss", "layer", "kept"}


def test_budgets_are_met_on_a_prompt_that_was_not_seen(frozen: Frozen, boxes: list[Encoded]) -> None:
    torch.manual_seed(0)
    part = Part(frozen, OPTIONS, boxes[0])
    untrained = Part(frozen, {**OPTIONS, "warm": 0}, boxes[0])
    signals = frozen.signals(boxes[1], EveryLayer(), 0.5)
    with torch.no_grad():
        for budget in OPTIONS["budgets"]:
            assert float(part.plan(signals, budget).added) == pytest.approx(budget, abs=0.06)
        assert abs(float(untrained.plan(signals, 0.2).added) - 0.2) > 0.1


def test_a_share_of_one_is_the_untouched_model(frozen: Frozen, boxes: list[Encoded]) -> None:
    """But for the token that pays least, which the soft threshold may leave out."""
    torch.manual_seed(0)
    part = Part(frozen, OPTIONS, boxes[0])
    with torch.no_grad():
        assert isinstance(part.net, Planner)
        last = part.net.leave[-1]
        assert isinstance(last, torch.nn.Linear)
        last.weight.zero_()
        last.bias.copy_(torch.tensor([20.0, 20.0]))  # k behind the last layer, r = 1
        logits, plan = part.planned(boxes[0], 0.9)
        whole = frozen.logits(boxes[0])
    assert float(plan.added) == pytest.approx(1, abs=1e-3)
    assert logits.argmax(-1).equal(whole.argmax(-1))
