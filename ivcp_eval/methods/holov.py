"""Keeps of every stretch of the image the tokens that the vision tower attends to most; better stretches keep more.

Paper: https://arxiv.org/abs/2510.02912 (section 3: crop-wise attention, an adaptive budget for each crop).
Reference: https://github.com/obananas/HoloV @ 1d2e65e (llava/model/utils.py and qwen-model-HoloV/utils.py, ``HoloV``)

The tokens are cut, in their order, into P stretches of equal length: 16 with a class token (LLaVA), else 1024/576 N/T
for T of N tokens (Qwen). In a stretch a token scores a thousand times its attention plus 0.09 times the variance of
its cosines to the others, brought to the same scale; the budget is dealt out in proportion to the mean scores, rounded
down, what is left to the best stretches. A stretch keeps its tokens of the largest attention. Survivors stand stretch
by stretch, by descending attention (in order where all stay), as in the released code, where their positions are
numbered anew.

Differs: a stretch that is due more than it has keeps everything, and the released code fills up with vectors of zeros;
here these are a choice (``fill``). Attention of a windowed tower is put in the order of the image first. Each image
has its own budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import best_of_rest, block_rows, ranking, sparse_weights
from ivcp_eval.methods._at_input import AtInput, embeddings, importance, in_output_order


@dataclass(frozen=True)
class Method(AtInput):
    """HoloV.

    Attributes:
        stretches: P; None as released.
        fill: what takes the places that no stretch can fill: "zeros" as released, or the "best" tokens left.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})
    faithfulness: ClassVar[Faithfulness] = "faithful"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {**AtInput.released, "fill": ("zeros",)}

    stretches: int | None = None
    fill: Literal["zeros", "best"] = "zeros"

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if self.fill not in ("zeros", "best") or (self.stretches is not None and self.stretches < 1):
            raise ValueError(f"fill={self.fill!r} must be 'zeros' or 'best', stretches={self.stretches} 1 or more")

    def choose(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """Stretch by stretch the most attended tokens, then what fills the budget."""
        attention, states = importance(signals, image).float(), embeddings(signals, image).float()
        n, budget = attention.numel(), image.budget
        kept = torch.cat(self._by_stretch(attention, states, budget, "cls" in signals.vision))
        taken = torch.zeros(n, dtype=torch.bool, device=kept.device)
        taken[kept] = True
        rest = best_of_rest(attention, taken, budget - kept.numel())
        places, whole = torch.cat((kept, rest)), kept if self.fill == "zeros" else torch.cat((kept, rest))
        rows = torch.arange(whole.numel(), device=kept.device)
        weights = sparse_weights(rows, whole, torch.ones_like(rows).float(), (budget, n))
        return in_output_order(signals, places, weights)

    def _by_stretch(self, attention: Tensor, states: Tensor, budget: int, class_token: bool) -> list[Tensor]:
        n = attention.numel()
        count = self.stretches or (16 if class_token else max(1, int(1024 / 576 * n / budget)))
        parts = torch.arange(n, device=attention.device).tensor_split(min(count, n))
        scores = torch.stack(
            [stretch_score(attention[part], states[part], block_rows(n)) for part in parts]
        ).nan_to_num(0, 0, 0)
        shares = scores / (scores.sum() + 1e-6)
        quotas = (shares * budget).floor().long().clamp_min(0)
        quotas[ranking(shares)[: max(0, budget - int(quotas.sum()))]] += 1
        pairs = zip(parts, quotas.tolist(), strict=True)
        return [part[ranking(attention[part])[:quota]] if quota < part.numel() else part for part, quota in pairs]


def stretch_score(attention: Tensor, states: Tensor, size: int) -> Tensor:
    """() the mean score of a stretch, from its tokens' attention (m,) and states (m, E), ``size`` at a time."""
    unit = states / (states.norm(dim=1, keepdim=True) + 1e-6)
    m, variances = len(unit), []
    places = torch.arange(m, device=unit.device)
    for rows in places.split(size):
        cosine = (unit[rows] @ unit.T).masked_fill(places == rows[:, None], 0)
        mean = cosine.sum(dim=1, keepdim=True) / max(1, m - 1)
        variances.append((cosine - mean).square().sum(dim=1) / max(1, m - 1))
    variance, scaled = torch.cat(variances), 1000 * attention
    return (scaled + 0.09 * variance * scaled.abs().mean() / (variance.abs().mean() + 1e-6)).mean()
