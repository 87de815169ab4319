"""VisionSelector's scorer, with the authors' differentiable top-k and constraint.

Paper: https://arxiv.org/abs/2510.16598
Reference: https://github.com/JulietChoo/VisionSelector @ 800a70f (selector_model.py, train_qwen_selector.py)

Tokens are multiplied by sigmoid(score + t), with the t of which these add up to the budget; a cross-entropy draws them
to 0 and 1, with a weight that grows in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Signals
from ivcp_eval.lab.training import part
from ivcp_eval.lab.training.frozen import Encoded, Frozen
from ivcp_eval.lab.training.part import Loss
from ivcp_eval.lab.training.parts._selector import Input
from ivcp_eval.methods._at_input import embeddings
from ivcp_eval.methods._trained import Scorer


class Part(part.Part):
    """Options: ``budget``, the share kept; ``constraint``, first and last weight; ``hidden``, 0 for half the width."""

    watch: ClassVar[AbstractMethod] = Input()

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        super().__init__(frozen, options, example)
        signals = frozen.signals(example, self.watch, options["budget"])
        self.net = Scorer(signals.hidden.shape[-1], options["hidden"]).to(signals.hidden.device)

    def loss(self, example: Encoded, rng: np.random.Generator, done: float) -> Loss:
        """The answer's, and the constraint's."""
        del rng
        constraints: list[Tensor] = []

        def gate(signals: Signals) -> Tensor:
            gates = torch.ones(signals.n_visual, device=signals.visual.device)
            for image in signals.images:
                soft = soft_top_k(self.net(embeddings(signals, image)), image.budget)
                hard = torch.zeros_like(soft).index_fill(0, soft.topk(image.budget).indices, 1.0)
                constraints.append(torch.nn.functional.binary_cross_entropy(soft, hard))
                gates = gates.index_copy(0, image.tokens, soft)
            return gates

        answer = self.frozen.answer_loss(example, self.watch, self.options["budget"], gate, where="states")
        first, last = self.options["constraint"]
        constraint = torch.stack(constraints).mean()
        total = answer + (first + (last - first) * done) * constraint
        return total, {"answer": answer.item(), "constraint": constraint.item()}


def soft_top_k(scores: Tensor, k: int) -> Tensor:
    """(N,) sigmoid(score + t) that add up to ``k`` < N, with the gradient of that t too."""
    with torch.no_grad():
        low, high = -scores.max() - 10, -scores.min() + 10
        for _ in range(64):
            middle = (low + high) / 2
            if torch.sigmoid(scores + middle).sum() < k:
                low = middle
            else:
                high = middle
        slope = torch.sigmoid(scores + middle) * (1 - torch.sigmoid(scores + middle))
    # One step of Newton's method, which changes t by nothing, has the gradient that the condition on the sum gives t.
    t = middle - (torch.sigmoid(scores + middle).sum() - k) / slope.sum()
    return torch.sigmoid(scores + t).clamp(0.0, 1.0)
