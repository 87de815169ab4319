"""Keeps what PruMerge keeps, and tokens spread evenly over the image, each joined by the tokens most like it.

Paper: https://arxiv.org/abs/2403.15388 (section 3.3: PruMerge+, spatially uniform tokens).
Reference: https://github.com/42Shawn/LLaVA-PruMerge @ 097c041 (llava/model/multimodal_encoder/clip_encoder.py)

Everything is as in `prumerge`, but that to the tokens of the largest attention come others at an even stride, behind
them.

Differs: what `prumerge` names; and a fixed budget splits one to three between attention and stride, as the released
rule comes out on average, which makes this a variant. ``counts="outliers"`` is that rule: a stride of a third of N
over the number of outliers; the released code fails where more than a third are outliers, here the stride is then 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness
from ivcp_eval.interface.ops import evenly, ranking
from ivcp_eval.methods.prumerge import Method as PruMerge
from ivcp_eval.methods.prumerge import n_outliers


@dataclass(frozen=True)
class Method(PruMerge):
    """PruMerge+."""

    faithfulness: ClassVar[Faithfulness] = "variant"

    def centres(self, attention: Tensor, budget: int) -> Tensor:
        """By descending attention, then by place."""
        n, order = attention.numel(), ranking(attention)
        taken = torch.zeros(n, dtype=torch.bool, device=order.device)
        if self.counts == "outliers":
            share = n_outliers(attention) / n
            best = order[: int(n * share)]
            stride = torch.arange(0, n - 1, max(1, int(int(1 / share) / 3)), device=order.device) if share else best
            taken[best] = True
            return torch.cat((best, stride[~taken[stride]])) if share else order[:1]
        count = budget - int(1 < budget < n)
        best = order[: -(-count // 4)]
        taken[best] = True
        left = (~taken).nonzero().flatten()
        return torch.cat((best, left[evenly(left.numel(), count - best.numel()).to(left.device)]))
