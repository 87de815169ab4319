"""Keeps the visual tokens whose features span the largest volume, each stretched by its relevance to the question.

Paper: https://arxiv.org/abs/2506.10967 (section 3: a determinantal point process conditional on the instruction).
Reference: https://github.com/Theia-4869/CDPruner @ 9541616 (llava/model/llava_arch.py, ``encode_images``), and its
form without CLIP in https://github.com/openvinotoolkit/openvino.genai @ da1db86

The kernel is r_i cos(x_i, x_j) r_j of the language model's input embeddings; the next token is the one that makes the
determinant of the chosen largest. Relevance, the rule that OpenVINO ships: the cosine of a token to the mean embedding
of the question, moved to 0..1 inside the image, gives r = exp(alpha * relevance) with alpha = theta / (2 (1 - theta)).

Differs: the authors' relevance is minus the cosine of CLIP's image and text embeddings, whose text tower no model here
carries; so this is a variant, while selection is the authors'. Where the budget exceeds the rank of the features (the
released code then chooses by NaN) the most relevant of the rest follow. Each image has its own budget and range of
relevance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signals
from ivcp_eval.interface.ops import unit_rows
from ivcp_eval.methods._at_input import AtInput, embeddings, relevance
from ivcp_eval.methods._greedy import log_determinant


@dataclass(frozen=True)
class Method(AtInput):
    """CDPruner.

    Attributes:
        theta: weight of relevance beside diversity, in [0, 1); 0.5 is OpenVINO's.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    theta: float = 0.5

    def __post_init__(self) -> None:
        """Refuse a weight that leaves no diversity."""
        if not 0 <= self.theta < 1:
            raise ValueError(f"theta={self.theta} is outside [0, 1)")

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """Conditional determinantal selection."""
        states = embeddings(signals, image)
        weight = (self.theta / (2 * (1 - self.theta)) * relevance(signals, image)).exp()
        return conditional_volume(states, weight, image.budget)


def conditional_volume(states: Tensor, weight: Tensor, k: int) -> Tensor:
    """``k`` of ``states`` (N, E) in order of choice, by the kernel weight_i cos_ij weight_j."""
    return log_determinant(torch.where(states.isfinite(), unit_rows(states), torch.nan) * weight[:, None], k, ridge=0.0)
