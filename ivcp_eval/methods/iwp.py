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
from ivcp_eval.interface.ops import best_of_rest, distances, last_token, unit_range

_WORDS = {
    "queries": ("question", "last"),
    "heads": ("mean", "max"),
    "key_heads": ("mean", "max"),
    "relevance": ("log", "linear"),
    "scale": ("range", "none"),
}


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
        for size in (high - low for low, high in pairwise(edges) if high > low):
            # Before the first chunk nothing is a duplicate; minus infinity times a trade of 0 would be NaN.
            score = relevance - self.trade * duplicates.clamp_min(-1) if self.trade else relevance
            new = best_of_rest(score, chosen, size)
            chosen[new] = True
            if self.trade:
                duplicates = torch.maximum(duplicates, duplication(key, value, at, at[new], self.key_heads).amax(dim=1))
        return image.tokens[chosen]


def duplication(key: Tensor, value: Tensor, tokens: Tensor, chosen: Tensor, heads: str = "mean") -> Tensor:
    """(N, C) eq. 12 of ``tokens`` (N,) against ``chosen`` (C,), both indices into n; mean or max over key heads.

    Args:
        key: (G, n, D) with RoPE. value: (G, n, D).
    """
    total = torch.full((tokens.numel(), chosen.numel()), 0.0 if heads == "mean" else -torch.inf, device=key.device)
    for k, v in zip(key.float(), value.float(), strict=True):
        unit = torch.nn.functional.normalize(v, dim=-1)
        cosine = unit[tokens] @ unit[chosen].T
        squared = distances(k[tokens], k[chosen]).square()
        one = cosine * (-squared / (2 * k.shape[-1] ** 0.5)).exp()
        total = total + one if heads == "mean" else torch.maximum(total, one)
    return total / key.shape[0] if heads == "mean" else total
