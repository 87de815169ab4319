"""Keeps the visual tokens whose states are carried over at the least cost of transport, and some of the rest evenly.

Paper: https://arxiv.org/abs/2503.18278 (an optimal transport cost of features, relative position and central distance).
Reference: none; no code is public, the parts as a review of the paper names them

Before decoder layer 2 the image's states, as they enter, are the source, what the layer makes of them behind its norm
the target, all of length 1. Cost_ij = alpha F_ij + beta S_ij + gamma E_i: F is their Euclidean distance in shares of
its root mean square, S = 1 - exp(-d_ij^2 / (2 sigma^2)) for a distance d_ij in an image of side 1, E a token's distance
from the middle in shares of the largest. Three rounds of Sinkhorn, rows then columns, turn exp(-cost / epsilon) into a
plan P between equal masses. Importance_i = -sum_j P_ij cost_ij / sum_j P_ij; a tenth of the budget is taken evenly from
what is not important.

Differs: how the plan becomes an importance and every constant but the layer and the three rounds are not public, so
this is a variant; each is a field. The rows of a balanced plan all carry the same mass, so that the plan's cost is what
tells tokens apart: ``importance="mass"`` ranks by what three rounds leave of a difference. The target is the output of
the model's final norm on the entering states: what the layer itself makes of them is known only after the cut. Each
image has its own budget and plan. Images that are no grid (tiles, newlines) are one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, Image, ModelFacts, Selection, Signals
from ivcp_eval.interface.ops import best_of_rest, block_rows, evenly, unit_rows
from ivcp_eval.methods._at_input import places

LEAST = 1e-30  # what a row or column of the kernel carries where all of it underflows


@dataclass(frozen=True)
class Method(AbstractMethod):
    """TopV.

    Attributes:
        layer: decoder layer whose input is cut.
        feature, relative, central: alpha, beta, gamma; 1 each, since all three parts of the cost are about 0..1.
        sigma: of the relative position, in sides of the image; an eighth looks at what is close.
        epsilon: of the entropy; 0.1 is usual for costs of about 1.
        rounds: of Sinkhorn.
        recovered: share of the budget that is taken evenly from the rest.
        importance: "cost" or "mass".
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    layer: int = 2
    feature: float = 1.0
    relative: float = 1.0
    central: float = 1.0
    sigma: float = 0.125
    epsilon: float = 0.1
    rounds: int = 3
    recovered: float = 0.1
    importance: Literal["cost", "mass"] = "cost"

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        for name in ("feature", "relative", "central"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("sigma", "epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite")
        if not 0 <= self.recovered <= 1:
            raise ValueError(f"recovered={self.recovered} must lie in 0..1")
        if self.layer < 0 or self.rounds < 1:
            raise ValueError(f"layer={self.layer} must be 0 or more, rounds={self.rounds} 1 or more")
        if self.importance not in ("cost", "mass"):
            raise ValueError(f"importance={self.importance!r} must be 'cost' or 'mass'")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut; earlier caches keep everything."""
        return (Cut(max(self.layer, model.first_cut), ratio, cache="from_cut"),)

    def select(self, signals: Signals) -> Selection:
        """The most important tokens and an even part of the rest, image by image."""
        assert signals.normed is not None
        normed, kept = signals.normed(), []
        for image in signals.images:
            at = signals.visual[image.tokens]
            chosen = self.choose(self.scores(signals.hidden[at], normed[at], places(image)), image)
            kept.append(image.tokens[chosen])
        return Selection(torch.cat(kept).sort().values)

    def choose(self, score: Tensor, image: Image) -> Tensor:
        """(K,) by ``score`` (N,)."""
        taken = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
        n_even = round(self.recovered * image.budget)
        taken[best_of_rest(score, taken, image.budget - n_even)] = True
        rest = (~taken).nonzero().flatten()
        taken[rest[evenly(rest.numel(), n_even).to(rest.device)]] = True
        return taken.nonzero().flatten()

    def scores(self, states: Tensor, normed: Tensor, place: Tensor) -> Tensor:
        """(N,) importance of ``states`` (N, E) that become ``normed`` (N, E) and stand at ``place`` (N, 2)."""
        source, target = unit_rows(states), unit_rows(normed)
        n, apart = len(source), place - place.mean(dim=0)
        scale = (
            self.feature / self.epsilon / float((1 - source.mean(dim=0) @ target.mean(dim=0)).clamp_min(1e-6)) ** 0.5
        )
        half, one = -apart.square().sum(dim=1, keepdim=True) / 2, torch.ones(n, 1, device=place.device)
        left, right = torch.cat((apart, half, one), dim=1) / self.sigma**2, torch.cat((apart, one, half), dim=1).T
        parts = list(zip(source.split(block_rows(n)), left.split(block_rows(n)), strict=True))
        square = torch.full((), scale**2, device=source.device)

        def priced(states: Tensor, stands: Tensor) -> tuple[Tensor, Tensor]:
            """(R, N) cost in shares of epsilon, and kernel with 1 as the largest of each row.

            Neither holds what is the same in a whole row (E among it): Sinkhorn takes that off the kernel.
            """
            price = torch.addmm(square, states, target.T, alpha=-(scale**2)).clamp_min_(0).sqrt_()
            price.sub_((stands @ right).exp_(), alpha=self.relative / self.epsilon)
            return price, (price.amin(dim=1, keepdim=True) - price).exp_()

        column = torch.ones(n, device=source.device)
        for _ in range(self.rounds):
            arrived, rows = torch.zeros_like(column), []
            for part in parts:
                _, kernel = priced(*part)
                rows.append((kernel @ column).clamp_min_(LEAST).reciprocal_())
                arrived = torch.addmv(arrived, kernel.T, rows[-1])
            column = arrived.clamp_min_(LEAST).reciprocal_()
        masses, costs = [], []
        for part in parts:
            price, kernel = priced(*part)
            masses.append(kernel @ column)
            costs.append(price.mul_(kernel) @ column)
        mass, from_middle = torch.cat(masses).clamp_min_(LEAST), apart.norm(dim=1)
        if self.importance == "mass":
            score = torch.cat(rows) * mass / n
        else:
            score = -self.epsilon * torch.cat(costs) / mass
            score -= self.central * from_middle / from_middle.amax().clamp_min(1e-6)
        return score.masked_fill(~source.any(dim=1), torch.nan)
