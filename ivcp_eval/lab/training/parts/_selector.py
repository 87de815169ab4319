"""What selectors of the same kind share: a score for each token, a choice by it, and the answer's loss behind it."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Image, ModelFacts, Selection, Signal, Signals, TowerSignal
from ivcp_eval.lab.training.frozen import Encoded
from ivcp_eval.lab.training.gating import bounded, straight_through
from ivcp_eval.lab.training.part import Loss, Part


class Input(AbstractMethod):
    """Looks at the tokens as they enter the model, and keeps all of them."""

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Before the first layer that may be cut."""
        return (Cut(model.first_cut, ratio),)

    def select(self, signals: Signals) -> Selection:
        """All of them."""
        return Selection(torch.arange(signals.n_visual, device=signals.visual.device), exact=False)


class Tower(Input):
    """And at what the vision tower says of each."""

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"feature"})


class Selector(Part):
    """A network that scores tokens, trained by the answer's loss through a straight-through choice.

    Scores become shares by a softmax over an image's tokens; the gates are 1 for what `keep` chooses and 0 for the
    rest, with the shares' gradient. Options: ``ratios``, of which each example draws what is kept of its tokens.
    """

    watch: ClassVar[AbstractMethod] = Tower()

    @abstractmethod
    def scores(self, signals: Signals, image: Image) -> Tensor:
        """(N,) of an image's tokens, with a gradient."""

    @abstractmethod
    def keep(self, scores: Tensor, signals: Signals, image: Image) -> Tensor:
        """(K,) which of the N tokens the method keeps by these scores."""

    def kept_share(self, ratio: float) -> float:
        """Of the tokens, where ``ratio`` was drawn."""
        return ratio

    def loss(self, example: Encoded, rng: np.random.Generator, done: float) -> Loss:
        """The answer's, told by what is kept."""
        ratio = float(rng.choice(self.options["ratios"]))
        return self.frozen.answer_loss(example, self.watch, self.kept_share(ratio), self.gate), {}

    def gate(self, signals: Signals) -> Tensor:
        """(V,) of a row's visual tokens."""
        gates = torch.ones(signals.n_visual, device=signals.visual.device)
        for image in signals.images:
            scores = self.scores(signals, image)
            kept = self.keep(scores.detach(), signals, image)
            gates = gates.index_copy(0, image.tokens, bounded(straight_through(kept, scores.softmax(0))))
        return gates
