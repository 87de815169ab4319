"""LearnPruner's importance predictor: an MLP on what the vision tower says of each token.

Trained as a review of the paper says: shares by a softmax, a straight-through choice of the largest, the model frozen.
What the first stage leaves is what the model sees; the second stage has no weights and takes no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ivcp_eval.interface import Image, Signals
from ivcp_eval.lab.training.frozen import Encoded, Frozen
from ivcp_eval.lab.training.parts._selector import Selector
from ivcp_eval.methods._trained import Importance, tower_states
from ivcp_eval.methods.learnpruner import Method


class Part(Selector):
    """Options: ``first``, ``diverse`` and ``apart`` of the method; ``hidden``, units of the MLP, 0 for half its input.

    Attributes:
        method: whose choice is trained.
    """

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        super().__init__(frozen, options, example)
        self.method = Method(first=options["first"], diverse=options["diverse"], apart=options["apart"])
        signals = frozen.signals(example, self.watch, 0.5)
        self.net = Importance(tower_states(signals, signals.images[0]).shape[-1], options["hidden"])
        self.net.to(signals.visual.device)

    def kept_share(self, ratio: float) -> float:
        """The first stage's."""
        return min(1.0, self.method.first * ratio)

    def scores(self, signals: Signals, image: Image) -> Tensor:
        """The predictor's."""
        scores: Tensor = self.net(tower_states(signals, image))
        return scores

    def keep(self, scores: Tensor, signals: Signals, image: Image) -> Tensor:
        """As the method chooses, diversity included."""
        return self.method.pick(scores, signals, image)
