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
        kept = self._by_stretch(attention, states, budget, "cls" in signals.vision)
        taken = torch.zeros(n, dtype=torch.bool, device=kept.device)
        taken[kept] = True
        rest = best_of_rest(attention, taken, budget - kept.numel())
        places, whole = torch.cat((kept, rest)), kept if self.fill == "zeros" else torch.cat((kept, rest))
        rows = torch.arange(whole.numel(), device=kept.device)
        weights = sparse_weights(rows, whole, torch.ones_like(rows).float(), (budget, n))
        return in_output_order(signals, places, weights)

    def _by_stretch(self, attention: Tensor, states: Tensor, budget: int, class_token: bool) -> Tensor:
        n = attention.numel()
        count = min(n, self.stretches or (16 if class_token else max(1, int(1024 / 576 * n / budget))))
        unit = states / (states.norm(dim=1, keepdim=True) + 1e-6)
        # The first n % count stretches have one token more.
        longer = n % count * (n // count + 1)
        scores = torch.cat(
            [
                stretch_scores(attention[part].view(number, -1), unit[part].view(number, -1, unit.shape[1]))
                for part, number in ((slice(longer), n % count), (slice(longer, n), count - n % count))
                if number
            ]
        ).nan_to_num(0, 0, 0)
        shares = scores / (scores.sum() + 1e-6)
        quotas = (shares * budget).floor().long().clamp_min(0)
        quotas[ranking(shares)[: max(0, budget - int(quotas.sum()))]] += 1
        sizes = torch.full_like(quotas, n // count)
        sizes[: n % count] += 1
        stretch = torch.arange(count, device=sizes.device).repeat_interleave(sizes)
        # Where all stay, in order: equal scores keep theirs.
        order = ranking(attention.masked_fill((quotas >= sizes)[stretch], 0))
        order = order[torch.sort(stretch[order], stable=True).indices]
        place = torch.arange(n, device=order.device) - (sizes.cumsum(0) - sizes)[stretch]
        return order[place < quotas[stretch]]


def stretch_scores(attention: Tensor, unit: Tensor) -> Tensor:
    """(P,) the mean score of stretches of m tokens, from their attention (P, m) and unit states (P, m, E)."""
    number, m, _ = unit.shape
    diagonal, variances = torch.arange(m, device=unit.device), []
    size = block_rows(number * m) * number  # rows that are compared with their stretch at a time
    for some in unit.split(max(1, size // m)):
        of_these = []
        for rows in diagonal.split(size):
            cosine = (some[:, rows] @ some.transpose(1, 2)).masked_fill_(diagonal == rows[:, None], 0)
            mean = cosine.sum(dim=2, keepdim=True) / max(1, m - 1)
            of_these.append(cosine.sub_(mean).square_().sum(dim=2) / max(1, m - 1))
        variances.append(torch.cat(of_these, dim=1))
    variance, scaled = torch.cat(variances), 1000 * attention
    scale = scaled.abs().mean(dim=1, keepdim=True) / (variance.abs().mean(dim=1, keepdim=True) + 1e-6)
    return (scaled + 0.09 * variance * scale).mean(dim=1)
