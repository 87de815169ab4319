"""Keeps the visual tokens that the last token attends to, and of the others those most and least like them.

Paper: https://arxiv.org/abs/2605.09429 (eq. 3 to 10: saliency of the whole question, entropy, contrastive routing).
Reference: none of the authors; the equations as a third party's port for vLLM cites them

Of a budget of K, int(0.8 K) are anchors: the tokens of most attention of the prompt's last token. A token's saliency
is the most that any token of the question attends to it; H is the entropy of the saliencies that add up to 1, divided
by ln N. Every other token scores its largest cosine to an anchor minus its mean cosine to the references, the N // 10
tokens of the least saliency, both of hidden states. With K' places left, floor(K' (0.05 + 0.1 H)) go to the lowest
scores and the others to the highest: the more the question looks everywhere, the more is kept beside the anchors' kind.

Differs: every constant is the port's alone, so this is a variant, and each is a field: ``layer``, ``anchors``, ``low``,
``high``, ``references``; so is ``heads``, of which nothing is said. The question is what stands behind the last image.
The port gives the lowest scores a place at least; here the formula holds. One token at least is an anchor, without
which no cosine can be taken. Each image has its own budget and entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, Image, ModelFacts, Selection, Signal, Signals
from ivcp_eval.interface.ops import best_of_rest, last_token, max_similarity, mean_attention, ranking, unit_rows


@dataclass(frozen=True)
class Method(AbstractMethod):
    """COAST.

    Attributes:
        layer: decoder layer whose input is cut, by the attention of the layer before; None as in the port: 2, on Qwen's
            families half of the layers (14 of 28).
        anchors: share of the budget that the last token's attention fills.
        low, high: share of the other places that goes to the lowest scores at an entropy of 0 and of 1.
        references: share of the image's tokens that scores are contrasted with.
        heads: "mean" of the question's attention over heads, before the largest is taken, or the "max".
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    layer: int | None = None
    anchors: float = 0.8
    low: float = 0.05
    high: float = 0.15
    references: float = 0.1
    heads: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        shares = {name: getattr(self, name) for name in ("anchors", "low", "high", "references")}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must lie in 0..1")
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"layer={self.layer} has no layer before it whose attention could rank; use 1 or more")
        if self.heads not in ("mean", "max"):
            raise ValueError(f"heads={self.heads!r} must be 'mean' or 'max'")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut; earlier caches keep everything."""
        usual = model.n_layers // 2 if model.family.startswith("qwen") else 2
        layer = usual if self.layer is None else self.layer
        return (Cut(max(layer, model.first_cut), ratio, cache="from_cut"),)

    def select(self, signals: Signals) -> Selection:
        """Anchors, the tokens most like them, and those least like them, image by image."""
        saliency, last = self.saliency(signals), mean_attention(signals, last_token(signals))
        kept = []
        for image in signals.images:
            states = signals.hidden[signals.visual[image.tokens]]
            chosen = self.choose(saliency[image.tokens], last[image.tokens], states, image)
            kept.append(image.tokens[chosen])
        return Selection(torch.cat(kept).sort().values)

    def saliency(self, signals: Signals) -> Tensor:
        """(V,) the most that any token of the question attends to each visual token."""
        most = torch.zeros(signals.n_visual, device=signals.visual.device)
        for rows in signals.question.split(64):
            attention = signals.attention(rows)[:, :, signals.visual]
            attention = attention.mean(dim=0) if self.heads == "mean" else attention.amax(dim=0)
            most = torch.maximum(most, attention.amax(dim=0))
        return most

    def choose(self, saliency: Tensor, last: Tensor, states: Tensor, image: Image) -> Tensor:
        """(K,) of N tokens with ``saliency`` (N,), the ``last`` token's attention (N,) and hidden ``states`` (N, E)."""
        n, unit = saliency.numel(), unit_rows(states)
        anchors = ranking(last)[: max(1, int(self.anchors * image.budget))]
        places = image.budget - anchors.numel()
        n_low = math.floor(places * (self.low + (self.high - self.low) * entropy(saliency)))
        references = ranking(-saliency)[: max(1, int(self.references * n))]
        score = max_similarity(unit, unit[anchors]) - unit @ unit[references].mean(dim=0)
        score = score.masked_fill(~unit.any(dim=1), torch.nan)  # neither like nor unlike anything
        taken = torch.zeros(n, dtype=torch.bool, device=unit.device)
        taken[anchors] = True
        taken[best_of_rest(score, taken, places - n_low)] = True
        taken[best_of_rest(-score, taken, n_low)] = True
        return taken.nonzero().flatten()


def entropy(saliency: Tensor) -> float:
    """Of the shares of ``saliency`` (N,) in its sum, divided by ln N; 0 for one token."""
    if saliency.numel() < 2:
        return 0.0
    clean = saliency.nan_to_num(0, 0, 0)
    share = (clean / clean.sum().clamp_min(1e-10)).clamp_min(1e-10)
    return min(1.0, float(-(share * share.log()).sum()) / math.log(saliency.numel()))
