"""Keeps SnapKV's visual tokens, many in the caches of the first layers and few in those of the last.

Paper: https://arxiv.org/abs/2406.02069 (section 4: budgets that fall arithmetically with the layer).
Reference: https://github.com/Zefan-Cai/PyramidKV @ 5d4e2e1 (pyramidkv/pyramidkv_utils.py, ``PyramidKVCluster``)

The share of the last layer is the mean share over ``beta``, that of the first makes up for it, between them shares fall
by equal steps; above a mean share of 1/2 all layers keep the same. Tokens are chosen as in SnapKV, by the released
window of 8 and the maximum over 7 neighbours. The prompt is processed whole, then memory is freed.

Differs: only visual tokens leave, all text stays, and the mean share is the retention ratio; budgets are released for
the whole prompt, whose last 8 tokens are not counted. Each layer's share is rounded for every image; the released code
rounds the steps down, which gives the last layers more. For window and heads see `snapkv`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ivcp_eval.interface import Faithfulness
from ivcp_eval.methods._evicting import Voting


@dataclass(frozen=True)
class Method(Voting):
    """PyramidKV.

    Attributes:
        beta: how many times the mean share the last layer's is less.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    window: int = 8
    kernel: int = 7
    pooling: Literal["mean", "max"] = "max"
    beta: float = 20.0

    def __post_init__(self) -> None:
        """Refuse a pyramid that stands on its head."""
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta={self.beta} must be 1 or more")

    def shares(self, n_layers: int, ratio: float) -> list[float]:
        """Falling with the layer."""
        if ratio > 0.5 or n_layers == 1:
            return [ratio] * n_layers
        last = ratio / self.beta
        step = 2 * (ratio - last) / (n_layers - 1)
        return [2 * ratio - last - step * layer for layer in range(n_layers)]
