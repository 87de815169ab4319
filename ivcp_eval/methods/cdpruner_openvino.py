"""Keeps of each half of an image the visual tokens that span the largest volume, as OpenVINO GenAI ships CDPruner.

Paper: https://arxiv.org/abs/2506.10967 (section 3), from which the product departs; `cdpruner` is the paper's.
Reference: https://github.com/openvinotoolkit/openvino.genai @ da1db86 (src/cpp/src/visual_language/cdpruner,
vision_token_pruning_processor.cpp)

An image is split in the middle of its tokens, and each half is chosen from on its own, the first with half of the
budget, rounded down. Relevance r is the cosine of a token's input embedding to the mean embedding of all text but the
markers around images, chat template included, moved to 0..1 inside the half. Tokens are taken greedily by the
determinant of the kernel ((1 - theta) + theta r_i r_j) cos(x_i, x_j). (The documented exp(alpha r) is the product's
fallback, for machines on which its kernel model cannot be compiled.)

Differs: shares are rounded half to even, there away from zero. There, text behind an image moves up where the image's
last rows and columns all go. Epsilons of 1e-6 under roots are left out. On the embedded model the product's answers are
these on 44 of 60 questions at 50 % (unpruned: 60 of 60; docs/LOG.md); why the others differ is not known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signals
from ivcp_eval.interface.ops import unit_rows
from ivcp_eval.methods._at_input import AtInput, embeddings, relevance
from ivcp_eval.methods._volume import largest_volumes


@dataclass(frozen=True)
class Method(AtInput):
    """CDPruner of OpenVINO GenAI.

    Attributes:
        theta: weight of relevance beside similarity, in [0, 1]; the product's ``relevance_weight``.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    theta: float = 0.5

    def __post_init__(self) -> None:
        """Refuse a weight that is no share."""
        if not 0 <= self.theta <= 1:
            raise ValueError(f"theta={self.theta} is outside [0, 1]")

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """Half by half."""
        signals = replace(signals, question=_instruction(signals))
        middle, first = image.tokens.numel() // 2, image.budget // 2
        both = (image.tokens[:middle], first, 0), (image.tokens[middle:], image.budget - first, middle)
        halves = [half for half in both if half[1]]
        features = [self._features(signals, replace(image, tokens=tokens)) for tokens, _, _ in halves]
        chosen = largest_volumes(features, [k for _, k, _ in halves])
        return torch.cat([start + one for one, (_, _, start) in zip(chosen, halves, strict=True)])

    def _features(self, signals: Signals, image: Image) -> Tensor:
        # The kernel's entries are the inner products of two weighted copies of a token side by side.
        unit, weight = unit_rows(embeddings(signals, image)), relevance(signals, image)[:, None]
        both = torch.cat(((1 - self.theta) ** 0.5 * unit, self.theta**0.5 * weight * unit), dim=1)
        # Equal tokens (newlines of tiled families) would be told apart by rounding; the first is to be the larger.
        first_longer = 1 - 1e-5 * torch.linspace(0, 1, len(both), device=both.device)
        return both * first_longer[:, None]


def _instruction(signals: Signals) -> Tensor:
    """Where text stands, but for the tokens next to an image, its markers."""
    step = torch.tensor([-1, 1], device=signals.visual.device)
    markers = torch.cat([signals.visual[image.tokens[[0, -1]]] + step for image in signals.images])
    return signals.text[~torch.isin(signals.text, markers)]
