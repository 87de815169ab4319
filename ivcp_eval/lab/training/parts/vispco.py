"""VisPCO's search: a network learns at which layer and to what share FastV should prune for a budget of FLOPs.

Paper: https://arxiv.org/abs/2604.15188 (budget-aware search for a pruning configuration)
Reference: https://github.com/JHW5981/VisPCO @ 7109fc0 (qwen2_5_vl_fastv.py ``PredictPruningRatio``, losses.py)

From the input's embeddings, modulated by the budget (FiLM), come k and r; layer i keeps 1 + (r - 1) sigmoid(10 (i - k))
of the visual tokens. In training every layer but the first gates its tokens by the attention that the prompt's last one
paid to them in the layer before, from 0 to 1, against a soft threshold, straight through at temperature 0.1.

Differs: FLOPs are shares of what visual tokens can add to the prompt, not tera-FLOPs, and count a gated MLP and grouped
heads; the first layer, which nothing can prune, counts whole. The multiplier w stays, and sigma grows by alpha in steps
of the training, not whenever an epoch brought the budget no nearer. No dropout, and no gradient through the scores,
which are of the prompt's last token, as in pruning; the reference takes the answer's last one in training. The network
begins where it meets the budgets of one prompt (``warm``), which saves most of the examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.interface import Cut, ModelFacts, Signal, Signals
from ivcp_eval.interface.ops import unit_range
from ivcp_eval.lab.training import part
from ivcp_eval.lab.training.frozen import Encoded, Frozen
from ivcp_eval.lab.training.gating import straight_through
from ivcp_eval.lab.training.part import Loss
from ivcp_eval.lab.training.parts._selector import Input

STEEPNESS = 10.0  # of the step over layers
SPREAD, TEMPERATURE = 5.0, 0.1  # of the soft threshold; of the straight-through estimate


class Block(nn.Module):
    """A layer of half the width, beside a projection to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width // 2), nn.GELU())
        self.beside = nn.Linear(width, width // 2)

    def forward(self, states: Tensor) -> Tensor:
        """(n, width / 2) of ``states`` (n, width)."""
        out: Tensor = self.net(states) + self.beside(states)
        return out


class Planner(nn.Module):
    """(k, r) for a prompt and a budget.

    Args:
        width: E of the embeddings, divisible by 8. layers: of the decoder.
    """

    layers: Tensor

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        half, quarter, eighth = width // 2, width // 4, width // 8
        self.enter = nn.Linear(width, half)
        self.blocks = nn.ModuleList([Block(half), Block(quarter)])
        self.budget = nn.Sequential(nn.Linear(1, quarter), nn.GELU(), nn.Linear(quarter, quarter))
        self.film = nn.ModuleList([nn.Linear(quarter, 2 * quarter), nn.Linear(quarter, 2 * eighth)])
        head = (
            nn.LayerNorm(eighth),
            nn.Linear(eighth, 256),
            nn.GELU(),
            nn.Linear(256, 128),
            nn.GELU(),
            nn.Linear(128, 2),
        )
        self.leave = nn.Sequential(*head)
        self.register_buffer("layers", torch.tensor(float(layers)))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Planner:
        """One of the shape that these weights have."""
        return cls(tensors["enter.weight"].shape[1], int(tensors["layers"]))

    def forward(self, states: Tensor, budget: float) -> tuple[Tensor, Tensor]:
        """k in 0..layers, and r in 0..1.

        Args:
            states: (n, E) the prompt's embeddings. budget: in 0..1, of what visual tokens can add.
        """
        known = self.budget(states.new_full((1,), budget, dtype=torch.float32))
        states = self.enter(states.float())
        for block, film in zip(self.blocks, self.film, strict=True):
            scale, shift = film(known).chunk(2)
            states = scale * block(states) + shift
        k, r = self.leave(states.mean(dim=0)).sigmoid()
        return k * self.layers, r


def shares(k: Tensor, r: Tensor, layers: int, first: int) -> Tensor:
    """(L,) of the visual tokens that each layer keeps; those up to ``first`` keep all."""
    steps = torch.sigmoid(STEEPNESS * (torch.arange(layers, device=k.device) - k))
    kept = 1 + (r - 1) * steps
    return torch.where(torch.arange(layers, device=k.device) > first, kept, 1.0)


def added_flops(kept: Tensor, shape: DecoderShape, visual: int, text: int) -> Tensor:
    """What visual tokens add to a prompt without any, as a share of what all of them would; ``kept``: `shares`."""

    def whole(of: Any) -> Any:
        return sum(shape.layer_flops(text + visual * of[layer], layer) for layer in range(shape.layers))

    none, everything = whole([0.0] * shape.layers), whole([1.0] * shape.layers)
    share: Tensor = (whole(kept) - none) / (everything - none)
    return share


def keeps(score: Tensor, share: Tensor) -> Tensor:
    """(V,) gates: 1 where the logarithm of ``score`` (V,) is above the soft threshold for ``share`` of them, else 0.

    The gradient reaches ``share`` by way of the threshold.
    """
    logs = (score + 1e-8).log()
    places = torch.arange(logs.numel(), device=logs.device)
    near = torch.exp(-((places - logs.numel() * share) ** 2) / SPREAD)
    threshold = (logs.sort(descending=True).values * near).sum() / (near.sum() + 1e-8)
    soft = torch.sigmoid((logs - threshold) / TEMPERATURE)
    return straight_through((logs >= threshold).nonzero().flatten(), soft)


class EveryLayer(Input):
    """Looks at the input of every layer that may be cut, and keeps every token."""

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key"})

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Observations."""
        return tuple(Cut(layer, 1.0) for layer in range(model.first_cut, model.n_layers))


@dataclass
class Plan:
    """What one prompt was given: (k, r), its shares by layer, and the FLOPs that they add."""

    k: Tensor
    r: Tensor
    shares: Tensor
    added: Tensor
    alive: Tensor = field(default_factory=lambda: torch.ones(()))  # gates so far, without a gradient


class Part(part.Part):
    """Options: ``budgets``, ``kl``, ``w``, ``sigma``, ``alpha`` and ``stages`` of the loss; ``warm`` steps before."""

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        super().__init__(frozen, options, example)
        self.shape = frozen.session.shape
        signals = frozen.signals(example, EveryLayer(), 0.5)
        self.net = Planner(signals.hidden.shape[-1], self.shape.layers).to(signals.hidden.device)
        self._meet_budgets(signals)

    def _meet_budgets(self, signals: Signals) -> None:
        """Before the training: the budgets alone, on one prompt, which takes no pass through the model."""
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.003)
        for _ in range(self.options["warm"]):
            optimizer.zero_grad()
            missed = [budget - self.plan(signals, budget).added for budget in self.options["budgets"]]
            torch.stack(missed).square().mean().backward()
            optimizer.step()

    def loss(self, example: Encoded, rng: np.random.Generator, done: float) -> Loss:
        """The teacher's divergence, and how far the FLOPs are from a drawn budget."""
        budget = float(rng.choice(self.options["budgets"]))
        with torch.no_grad():
            teacher = self.frozen.logits(example).log_softmax(dim=-1)
        logits, plan = self.planned(example, budget)
        kl = torch.nn.functional.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
        stage = min(int(done * self.options["stages"]), self.options["stages"] - 1)
        sigma, miss = self.options["sigma"] * self.options["alpha"] ** stage, budget - plan.added
        loss = self.options["kl"] * kl - 0.1 * self.options["w"] * miss + sigma * miss**2
        figures = {"kl": kl, "miss": miss.abs(), "layer": plan.k, "kept": plan.r}
        return loss, {name: float(value.detach()) for name, value in figures.items()}

    def planned(self, example: Encoded, budget: float) -> tuple[Tensor, Plan]:
        """The answer's logits (T, vocabulary) under what the network plans for the budget, and the plan."""
        plans: list[Plan] = []

        def gate(signals: Signals) -> Tensor:
            assert signals.cut is not None
            if not plans:
                plans.append(self.plan(signals, budget))
                return torch.ones(signals.n_visual, device=signals.visual.device)
            plan = plans[0]
            paid = signals.attention(signals.text[-1:])[:, 0, signals.visual].mean(dim=0).detach() * plan.alive
            gates = keeps(unit_range(paid), plan.shares[signals.cut.layer])
            plan.alive = plan.alive * gates.detach()
            return gates

        logits = self.frozen.logits(example, EveryLayer(), 0.5, gate)
        return logits, plans[0]

    def plan(self, signals: Signals, budget: float) -> Plan:
        """For one prompt, as it enters the first layer that may be cut."""
        assert signals.cut is not None
        prompt = torch.cat((signals.visual, signals.text))
        k, r = self.net(signals.hidden[prompt], budget)
        kept = shares(k, r, self.shape.layers, signals.cut.layer)
        return Plan(k, r, kept, added_flops(kept, self.shape, signals.n_visual, signals.text.numel()))
