"""Keeps visual tokens that the vision tower attends to and a few unlike them, then those that the question reads.

Paper: https://arxiv.org/abs/2604.23950 (two stages: importance and diversity before the language model, text
attention in its middle layers).
Reference: none; the authors' code was promised, its parts as a review of the paper describes them

Nine tenths of the first budget are the most important tokens, one tenth are tokens that max-min selection by cosine
adds to them. Before layer 12 of 32 the attention of all tokens of the question, mean over them and over heads, drops
two thirds of these.

Differs: the weights of the importance predictor are not public. `ivcp lab train learnpruner` makes such for a model:
``weights``; its input (the vision tower's states) and layers follow from the published number of parameters alone.
Without a file importance is the attention of the vision tower (of the class token, else received), which the paper
compares its predictor with. Both are variants. Where diversity begins is not said: ``apart``. The retention ratio is
what is left at the end, three times that before. Layer 12 is a share of the depth on other models, and ranks by the
attention of the layer before. Each image has its own budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Faithfulness, Image, ModelFacts, Selection, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import best_of_rest, mean_attention, top_of_each_image
from ivcp_eval.methods._at_input import AtInput, embeddings, importance
from ivcp_eval.methods._greedy import farthest_from, farthest_points
from ivcp_eval.methods._trained import Importance, answer_of, tower_states


@dataclass(frozen=True)
class Method(AtInput):
    """LearnPruner, with a predictor that was trained here or without one.

    Attributes:
        weights: file of a predictor (`ivcp lab train learnpruner`); None: the tower's attention.
        first: R1 : R2, how many times the tokens that are left at the end the first cut leaves, at most all.
        diverse: share of the first budget for diversity.
        apart: "all": diverse tokens are far from the important ones and from each other; "themselves": from each other
            only, as DivPrune would choose them among the rest.
        depth: of the second cut, as a share of the decoder's layers.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision", "query", "key"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    weights: Path | None = None
    first: float = 3.0
    diverse: float = 0.1
    apart: Literal["all", "themselves"] = "all"
    depth: float = 12 / 32

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if not self.first >= 1 or not 0 <= self.diverse <= 1 or not 0 <= self.depth < 1:
            raise ValueError(
                f"first={self.first} must be 1 or more, diverse={self.diverse} in 0..1, depth={self.depth} in [0, 1)"
            )
        if self.apart not in ("all", "themselves"):
            raise ValueError(f"apart={self.apart!r} must be 'all' or 'themselves'")

    @property
    def tower_signals(self) -> frozenset[TowerSignal]:  # type: ignore[override] # follows from a parameter
        """The states that the predictor reads, or the attention in place of it."""
        return frozenset({"feature"} if self.weights else {"received", "cls"})

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One at the input, one in the middle."""
        layer = max(model.first_cut + 1, int(model.n_layers * self.depth))
        renumber = model.renumbers(self.renumber)
        return (
            Cut(model.first_cut, min(1.0, self.first * ratio), renumber=renumber),
            Cut(layer, ratio, cache="from_cut", renumber=renumber),
        )

    def select(self, signals: Signals) -> Selection:
        """Importance and diversity; the question's attention in the second stage."""
        if signals.stage == 0:
            return super().select(signals)
        return Selection(top_of_each_image(mean_attention(signals, signals.question), signals.images))

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """The most important tokens, and those farthest from them."""
        if self.weights is None:
            return self.pick(importance(signals, image), signals, image)
        scores = answer_of(self.weights, "learnpruner", Importance, tower_states(signals, image))
        return self.pick(scores, signals, image)

    def pick(self, score: Tensor, signals: Signals, image: Image) -> Tensor:
        """The tokens of largest ``score`` (N,), and those farthest from them."""
        states = embeddings(signals, image)
        if image.budget == score.numel():  # the first cut of a large ratio
            return torch.arange(image.budget, device=score.device)
        taken = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
        important = best_of_rest(score, taken, image.budget - round(self.diverse * image.budget))
        if important.numel() == image.budget:
            return important
        if self.apart == "all" and important.numel():
            return farthest_from(states, important, image.budget)
        taken[important] = True
        rest = (~taken).nonzero().flatten()
        return torch.cat((important, rest[farthest_points(states[rest], image.budget - important.numel())]))
