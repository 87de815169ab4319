"""Likeness of tokens by their value states, which both presets rank by."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def value_similarity(value: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Mean over heads and queries of softmax over ``keys`` of V_q V_k^T / sqrt(D) (Algorithm 1, lines 3 and 5).

    Args:
        value: (G, n, D) value states. queries: (Q,) and keys: (N,) indices into n.

    Returns:
        (N,) float32.
    """
    states = value.float()
    keyed, total = states[:, keys].transpose(1, 2), states.new_zeros(keys.numel())
    for part in queries.split(64):  # so that long questions on long prompts stay small
        logits = states[:, part] @ keyed / states.shape[-1] ** 0.5
        total += logits.softmax(dim=-1).mean(dim=0).sum(dim=0)
    return total / queries.numel()
