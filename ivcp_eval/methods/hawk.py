"""Keeps the visual tokens that the question's queries match most in the first layer, by heads that matter for vision.

Paper: https://arxiv.org/abs/2604.07812 (eq. 4 to 7: head importance, text-guided scores).
Reference: https://github.com/peppery77/HAWK @ 3af2071 (src/hawk/pruning.py, ``compute_hawk_scores``)

Before the first decoder layer, that layer's queries of the question and keys of the image give, without RoPE, the mean
inner product over the question, of length 1 over the image's tokens in every head; heads add up by their weights.
Every survivor keeps its position.

Differs: the released weights of the heads come from ablations on evaluation sets and exist for one model, so they are
read from a file (they are the list in src/hawk/config.py; `ivcp calibrate hawk MODEL` makes one for any model);
without one all heads weigh the same, which makes the method a variant. The question is all that stands behind the last
image, chat markers included. The budget is rounded, not rounded up. Each image has its own budget. Families that add
visual features later are cut after these.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractScorer, Cut, Faithfulness, ModelFacts, Signals
from ivcp_eval.interface.ops import to_device


@dataclass(frozen=True)
class Method(AbstractScorer):
    """HAWK.

    Attributes:
        weights: JSON file with a list of numbers, one for each attention head; None weighs all heads the same.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    weights: Path | None = None

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for every layer's cache."""
        return (Cut(model.first_cut, ratio),)

    def score(self, signals: Signals) -> Tensor:
        """Head-weighted inner products of question and image."""
        assert signals.project is not None
        query = signals.project("query")[:, signals.question].float().mean(dim=1)  # (H, D)
        key = signals.project("key")[:, signals.visual].float()  # (G, V, D)
        product = torch.einsum("ghd,gvd->ghv", query.unflatten(0, (key.shape[0], -1)), key).flatten(0, 1)
        score = torch.zeros(signals.n_visual, device=product.device)
        weights = to_device(head_weights(self.weights, product.shape[0]), product.device)
        for image in signals.images:
            score[image.tokens] = weights @ torch.nn.functional.normalize(product[:, image.tokens], dim=1)
        return score


def head_weights(file: Path | None, n_heads: int) -> Tensor:
    """(H,) float32 weights that add up to 1.

    Raises:
        ValueError: the file does not hold one number of 0 or more for each head.
    """
    if file is None:
        return torch.full((n_heads,), 1 / n_heads)
    numbers = json.loads(file.read_text(encoding="utf-8"))
    usable = isinstance(numbers, list) and all(isinstance(x, int | float) and x >= 0 for x in numbers)
    if not usable or len(numbers) != n_heads or not sum(numbers) > 0:
        raise ValueError(f"{file} must hold a JSON list of {n_heads} numbers of 0 or more, one for each attention head")
    return torch.tensor(numbers, dtype=torch.float32) / sum(numbers)
