"""Keeps the visual tokens that a small transformer picks for the question, taught by the subsets that a search found.

Paper: https://arxiv.org/abs/2604.17087 (a compressor of one encoder layer on visual and textual context; its labels are
subsets of low loss and high diversity, found by an evolutionary search; losses: GHM and a cosine)
Reference: none; no code is public, its parts as a review of the paper describes them

Before the language model, visual tokens and the question go through one encoder layer, and each visual token gets the
logit of being kept; those with the highest stay.

Differs: the weights are not public. `ivcp lab train evocomp` makes such for a model: ``weights``. Without a file the
score is the cosine to the question's mean embedding, which is nothing of EvoComp's but what its compressor has to beat.
Both are variants. Width, heads, what stands for positions (here a token's row and column, and none for words) and how
the budget is taken from the logits are ours; so are the gaps of the search (lab/subsets/evolution.py) and the weights
of the two losses (lab/training/parts/evocomp.yaml).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from ivcp_eval.interface import Faithfulness, Image, Signals
from ivcp_eval.interface.ops import top
from ivcp_eval.methods._at_input import AtInput, embeddings, places, relevance
from ivcp_eval.methods._trained import answer_of

HEADS = 4


class Compressor(nn.Module):
    """One encoder layer over visual tokens and words, and a logit for each visual token.

    Args:
        width: E of the embeddings, which are normalised first, without parameters. states: of the layer.
    """

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.width = width
        self.enter, self.place = nn.Linear(width, states), nn.Linear(2, states)
        self.kind = nn.Parameter(torch.zeros(2, states))
        self.layer = nn.TransformerEncoderLayer(
            states, HEADS, 4 * states, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.leave = nn.Linear(states, 1)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Compressor:
        """One of the shape that these weights have."""
        states, width = tensors["enter.weight"].shape
        return cls(width, states)

    def forward(self, visual: Tensor, words: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) logits, and (N, states) what they are read from.

        Args:
            visual: (N, E) embeddings of one image. words: (Q, E) of the question. where: (N, 2) places in the image.
        """
        own = self._entered(visual, 0) + self.place(where)
        states = self.layer(torch.cat((own, self._entered(words, 1)))[None])[0, : len(visual)]
        return self.leave(states)[:, 0], states

    def _entered(self, states: Tensor, kind: int) -> Tensor:
        entered: Tensor = self.enter(nn.functional.layer_norm(states.float(), states.shape[-1:])) + self.kind[kind]
        return entered


@dataclass(frozen=True)
class Method(AtInput):
    """EvoComp, with a compressor that was trained here.

    Attributes:
        weights: file of a compressor (`ivcp lab train evocomp`); None: likeness to the question.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    weights: Path | None = None

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """The tokens with the highest logits."""
        if self.weights is None:
            return top(relevance(signals, image), image.budget)
        visual, words = embeddings(signals, image), signals.hidden[signals.question]
        logits, _ = answer_of(self.weights, "evocomp", Compressor, visual, words, places(image).float())
        return top(logits, image.budget)
