"""Keeps the visual tokens whose key-value products weigh most in attention's implicit weights, without duplicates.

Paper: https://arxiv.org/abs/2604.00757 (eq. 10: magnitude kappa(q, k) ||v||; eq. 12: duplication; progressive chunked
maximal marginal relevance).
Reference: https://github.com/jhtwosun/IWP @ d6bd2c7, which holds no code yet (a README that says work in progress).

Attention is a linear layer whose weights are a sum of rank-one updates phi(k_i)^T v_i, kappa(a, b) = exp(a.b/sqrt(D)):

* magnitude_i = kappa(q, k_i) ||v_i||, without RoPE;
* S_ij = cos(v_i, v_j) kappa(k_i, k_j) / sqrt(kappa(k_i, k_i) kappa(k_j, k_j)), with RoPE. That equals
  cos(v_i, v_j) exp(-||k_i - k_j||^2 / (2 sqrt(D))), the form computed here: nothing overflows;
* the next tokens maximise relevance_i - trade * max over chosen j of S_ij.

Differs: what is public leaves these open, so this is a variant, and each choice of ours is a field: ``layer``,
``queries``, ``heads``, ``key_heads``, ``trade`` (lambda), ``chunks``, ``relevance`` and ``scale``. Magnitudes are kept
as logarithms (a log-sum-exp over queries and, for "mean", heads). A chunk is the best tokens given the duplication with
all earlier chunks; inside a chunk duplicates are not looked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, Image, ModelFacts, Selection, Signal, Signals
from ivcp_eval.interface.ops import best_of_rest, last_token, unit_range

_WORDS = {
    "queries": ("question", "last"),
    "heads": ("mean", "max"),
    "key_heads": ("mean", "max"),
    "relevance": ("log", "linear"),
    "scale": ("range", "none"),
}
BLOCK = 2**22  # pairs of tokens and heads that are compared at a time


@dataclass(frozen=True)
class Method(AbstractMethod):
    """IWP.

    Attributes:
        layer: decoder layer whose input is cut, by queries, keys and values of the layer before; 2 as in FastV, since
            the savings reported need an early cut. Families whose first layers cannot be cut are cut after these.
        queries: "question" takes the mean of kappa over the tokens after the last image, "last" the last token's.
        heads: "mean" of the magnitudes over heads, or the "max".
        key_heads: "mean" of the duplication over key heads, or the "max".
        trade: lambda, the weight of duplication; 0 ranks by magnitude alone. 0.5 is usual for this form of MMR.
        chunks: in how many rounds an image's budget is filled; more is closer to one token at a time.
        relevance: "log" or "linear" magnitudes (in shares of the image's largest) are what duplication is taken from.
        scale: "range" brings them to 0..1 inside each image first, since S lies in -1..1; "none" leaves them.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key", "value"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    layer: int = 2
    queries: Literal["question", "last"] = "question"
    heads: Literal["mean", "max"] = "mean"
    key_heads: Literal["mean", "max"] = "mean"
    trade: float = 0.5
    chunks: int = 8
    relevance: Literal["log", "linear"] = "log"
    scale: Literal["range", "none"] = "range"

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        if self.layer < 1 or self.chunks < 1 or not self.trade >= 0:
            raise ValueError(
                f"layer={self.layer} and chunks={self.chunks} must be 1 or more, trade={self.trade} 0 or more"
            )

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut; earlier caches keep everything."""
        return (Cut(max(self.layer, model.first_cut), ratio, cache="from_cut"),)

    def select(self, signals: Signals) -> Selection:
        """Chunked maximal marginal relevance on every image."""
        assert signals.key is not None
        assert signals.value is not None
        assert signals.rotate is not None
        magnitude = self._log_magnitude(signals)
        key, value = signals.rotate(signals.key), signals.value
        kept = [self._select_image(image, signals.visual, magnitude, key, value) for image in signals.images]
        return Selection(torch.cat(kept).sort().values)

    def _log_magnitude(self, signals: Signals) -> Tensor:
        """(V,) log of kappa(q, k_i) ||v_i||, over the chosen queries and heads."""
        assert signals.query is not None
        assert signals.key is not None
        assert signals.value is not None
        rows = signals.question if self.queries == "question" else last_token(signals)
        key = signals.key[:, signals.visual].float()  # (G, V, D)
        norm = signals.value[:, signals.visual].float().norm(dim=-1)  # (G, V)
        summed = []  # over queries, some at a time; sums and means differ by a constant only
        for part in rows.split(64):
            query = signals.query[:, part].float().unflatten(0, (key.shape[0], -1))  # (G, H/G, Q, D)
            log_kappa = torch.einsum("ghqd,gvd->ghqv", query, key) / key.shape[-1] ** 0.5
            summed.append(log_kappa.logsumexp(dim=2))
        per_head = torch.stack(summed).logsumexp(dim=0) + norm.log()[:, None]
        return per_head.flatten(0, 1).logsumexp(dim=0) if self.heads == "mean" else per_head.amax(dim=(0, 1))

    def _select_image(self, image: Image, visual: Tensor, magnitude: Tensor, key: Tensor, value: Tensor) -> Tensor:
        at = visual[image.tokens]
        relevance = magnitude[image.tokens]
        if self.relevance == "linear":  # the largest finite magnitude is 1, so that nothing overflows
            relevance = (relevance - relevance.masked_fill(~relevance.isfinite(), -torch.inf).amax()).exp()
        if self.scale == "range":
            relevance = unit_range(relevance)
        chosen = torch.zeros(at.numel(), dtype=torch.bool, device=at.device)
        duplicates = torch.full_like(relevance, -torch.inf)
        edges = [image.budget * c // self.chunks for c in range(self.chunks + 1)]
        updates = Updates.of(key[:, at], value[:, at]) if self.trade else None
        for low, high in ((low, high) for low, high in pairwise(edges) if high > low):
            # Before the first chunk nothing is a duplicate; minus infinity times a trade of 0 would be NaN.
            score = torch.sub(relevance, duplicates.clamp_min(-1), alpha=self.trade) if self.trade else relevance
            new = best_of_rest(score, chosen, high - low)
            chosen[new] = True
            if updates is not None and high < image.budget:
                rest = (~chosen).nonzero().flatten()
                duplicates[rest] = torch.maximum(duplicates[rest], updates.largest(rest, new, self.key_heads))
        return image.tokens[chosen]


@dataclass(frozen=True)
class Updates:
    """The rank-one updates of N tokens, up to what eq. 12 cares for.

    Attributes:
        left, right: (G, N, D + 2) whose inner products are -||k_i - k_j||^2 / (2 sqrt(D)): keys, and half their squared
            lengths. The keys go without their mean: without what all keys share, inner products tell them apart as
            well as differences do.
        unit: (G, N, D) values of length 1.
    """

    left: Tensor
    right: Tensor
    unit: Tensor

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> Updates:
        """Of keys with RoPE and values, both (G, N, D)."""
        finite = key.isfinite().all(dim=-1, keepdim=True)
        total = key.float().masked_fill(~finite, 0).sum(dim=1, keepdim=True)
        centred = (key - total / finite.sum(dim=1, keepdim=True).clamp_min(1)) / key.shape[-1] ** 0.25
        half = -centred.square().sum(dim=-1, keepdim=True) / 2
        one = torch.ones_like(half)
        unit = torch.nn.functional.normalize(value.float(), dim=-1)
        return cls(torch.cat((centred, half, one), dim=-1), torch.cat((centred, one, half), dim=-1), unit)

    def largest(self, rows: Tensor, columns: Tensor, heads: str) -> Tensor:
        """(R,) the largest `duplication` of each of ``rows`` (R,) with any of ``columns`` (C,), some rows at a time."""
        size = max(1, BLOCK // (self.unit.shape[0] * columns.numel()))
        right, unit = self.right[:, columns].transpose(1, 2), self.unit[:, columns].transpose(1, 2)
        parts = zip(self.left[:, rows].split(size, dim=1), self.unit[:, rows].split(size, dim=1), strict=True)
        return torch.cat([_compared(*part, right, unit, heads).amax(dim=1) for part in parts])

    def duplication(self, rows: Tensor, columns: Tensor, heads: str) -> Tensor:
        """(R, C) eq. 12, mean or max over key heads."""
        right, unit = self.right[:, columns].transpose(1, 2), self.unit[:, columns].transpose(1, 2)
        return _compared(self.left[:, rows], self.unit[:, rows], right, unit, heads)


def _compared(left: Tensor, own: Tensor, right: Tensor, unit: Tensor, heads: str) -> Tensor:
    product = (left @ right).clamp_max_(0).exp_()
    product *= own @ unit
    return product.mean(dim=0) if heads == "mean" else product.amax(dim=0)
