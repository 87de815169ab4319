"""Tensor helpers that methods share: budgets, ranking with one tie rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ivcp_eval.interface import Image


def budget(ratio: float, n_tokens: int) -> int:
    """How many of an image's ``n_tokens`` visual tokens a retention ratio keeps: the one rounding rule.

    Python's ``round`` of the product (half to even, as in the released IVC-Prune code), and at least one token.
    """
    return min(n_tokens, max(1, round(ratio * n_tokens)))


def ranking(score: Tensor) -> Tensor:
    """Indices of ``score`` (N,) from best to worst, in float32; NaN is worst, ties fall to the lower index."""
    clean = torch.nan_to_num(score.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.sort(clean, descending=True, stable=True).indices


def top(score: Tensor, k: int) -> Tensor:
    """The ``k`` best indices of ``score`` (N,), increasing. ``k`` is clipped to 0..N."""
    return ranking(score)[: max(0, k)].sort().values


def top_of_each_image(score: Tensor, images: Sequence[Image]) -> Tensor:
    """Indices into the visual tokens, increasing: of each image its ``budget`` best by ``score`` (V,)."""
    kept = [image.tokens[top(score[image.tokens], image.budget)] for image in images]
    return torch.cat(kept).sort().values
