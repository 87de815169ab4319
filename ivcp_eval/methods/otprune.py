"""Keeps the visual tokens whose features, compared by their whole second moment, span the largest volume.

Paper: https://arxiv.org/abs/2602.20205 (section 3: a log-determinant objective for optimal transport to the full set).
Reference: https://github.com/xiwenc1/OTPrune @ 3414730 (LLaVA/llava/model/llava_arch.py, ``OTPrune``,
``greedy_select``)

The language model's input embeddings, each channel divided by its norm over the image's tokens, are F; G = F F^T; the
next token is the one that makes the determinant of I + gamma G G^T, restricted to the chosen, largest. G G^T is
computed as the inner products of F (F^T F)^(1/2), so that nothing as large as the square of the tokens exists.

Differs: the released code hands the survivors on in the order of a Python set of their indices; here they are sorted
(CPython iterates a set of small numbers in increasing order in most cases, but not in all). Each image has its own
budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signals
from ivcp_eval.methods._at_input import AtInput, embeddings
from ivcp_eval.methods._greedy import log_determinant


@dataclass(frozen=True)
class Method(AtInput):
    """OTPrune.

    Attributes:
        gamma: weight of the second moment beside the identity.
    """

    faithfulness: ClassVar[Faithfulness] = "faithful"

    gamma: float = 0.01

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """Greedy log-determinant selection."""
        states = embeddings(signals, image).float()
        states = states.nan_to_num(0, 0, 0).masked_fill(~states.isfinite().all(dim=1, keepdim=True), 0)
        scaled = torch.nn.functional.normalize(states, dim=0)
        values, axes = torch.linalg.eigh(scaled.T @ scaled)
        features = self.gamma**0.5 * (scaled @ axes) * values.clamp_min(0).sqrt()
        return log_determinant(features, image.budget, ridge=1.0)
