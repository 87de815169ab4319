"""Drops visual tokens in stages, most where layers bear low bits well, by scores computed from rounded states.

Paper: https://arxiv.org/abs/2604.17320 (a schedule of tokens over layers by calibrated sensitivity; scores of
activation magnitude, attention and low-bit risk under quantised operators; only the sensitivity's formula is known)
Reference: none; the authors' code was promised, the sensitivity as a review of the paper describes it

x_q are states in 4 bits, one scale per token. A layer's sensitivity is the median over calibration prompts of
||x_q - x|| / (||x|| + eta), x being what enters it, moved to 0..1 by its 10th and 90th percentile over layers
(`ivcp calibrate quota MODEL` measures it). Three cuts at 1/4, 1/2 and 3/4 of the depth share what is dropped by one
less the mean sensitivity of the layers up to the next cut. A token's score is magnitude + attention - risk, each moved
to 0..1 inside its image: the length of x_q, the last token's attention in the layer that is entered, from queries and
keys in 4 bits, and the token's own ||x_q - x|| / (||x|| + eta).

Differs: how a schedule follows from sensitivity, where it cuts, how the three parts of a score combine and the sign of
the risk are not public, so this is a variant; each is a field but the form of sum and schedule. A token that low bits
distort is taken for one that harms what attends to it: ``risk`` below 0 keeps it instead. The operators are the
model's own, with 8- or 4-bit weights where it is loaded so; states, queries and keys are rounded here, before the
choice alone: what the model computes with stays as it is. Without a file all layers count as equally sensitive.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractScorer, Cut, Faithfulness, ModelFacts, Signals
from ivcp_eval.interface.ops import unit_range


@dataclass(frozen=True)
class Method(AbstractScorer):
    """QUOTA's idea.

    Attributes:
        sensitivity: JSON file with a list of numbers, one for each decoder layer, as `ivcp calibrate quota` writes it.
        depths: where the cuts are, as shares of the decoder's depth, increasing.
        bits: of the rounded states. eta: in the quotient, against states of length 0.
        magnitude, attention, risk: weights of the parts of the score; 1 each, since each lies in 0..1.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    sensitivity: Path | None = None
    depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    bits: int = 4
    eta: float = 1e-6
    magnitude: float = 1.0
    attention: float = 1.0
    risk: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        object.__setattr__(self, "depths", tuple(self.depths))
        inside = all(0 <= depth < 1 for depth in self.depths)
        if not self.depths or not inside or list(self.depths) != sorted(set(self.depths)):
            raise ValueError(f"depths {self.depths} must be increasing shares of the decoder's depth in [0, 1)")
        if not 2 <= self.bits <= 16 or not self.eta > 0:
            raise ValueError(f"bits={self.bits} must lie in 2..16, eta={self.eta} be above 0")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Those that drop something; what is left behind the last is the ratio."""
        layers = sorted({max(model.first_cut, round(depth * model.n_layers)) for depth in self.depths})
        layers = [layer for layer in layers if layer < model.n_layers]
        sensitivity = layer_sensitivity(self.sensitivity, model.n_layers)
        borders = [*layers, model.n_layers]
        robust = torch.stack([1 - sensitivity[a:b].mean() for a, b in zip(layers, borders[1:], strict=True)])
        shares = robust / robust.sum() if robust.sum() > 0 else torch.full_like(robust, 1 / len(layers))
        left = [max(ratio, 1 - (1 - ratio) * float(share)) for share in shares.cumsum(0)]
        left[-1] = ratio
        before = [1.0, *left[:-1]]
        return tuple(
            Cut(layer, now, cache="from_cut")
            for layer, now, earlier in zip(layers, left, before, strict=True)
            if now < earlier
        )

    def score(self, signals: Signals) -> Tensor:
        """Magnitude and attention, less risk."""
        states = signals.hidden[signals.visual].float()
        low = rounded(states, self.bits)
        parts = (
            (self.magnitude, low.norm(dim=1)),
            (self.attention, self._attention(signals)),
            (-self.risk, distortion(low, states, self.eta)),
        )
        score = torch.zeros(signals.n_visual, device=states.device)
        for image in signals.images:
            for weight, part in parts:
                if weight:  # 0 times what is not finite would not be 0
                    score[image.tokens] += weight * unit_range(part[image.tokens])
        return score

    def _attention(self, signals: Signals) -> Tensor:
        """(V,) of the last token, mean over heads."""
        assert signals.project is not None
        assert signals.rotate is not None
        query = rounded(signals.rotate(signals.project("query"))[:, -1].float(), self.bits)  # (H, D)
        key = rounded(signals.rotate(signals.project("key")).float(), self.bits)  # (G, n, D)
        logits = torch.einsum("ghd,gnd->ghn", query.unflatten(0, (key.shape[0], -1)), key) / key.shape[-1] ** 0.5
        return logits.softmax(dim=-1).mean(dim=(0, 1))[signals.visual]


def rounded(states: Tensor, bits: int) -> Tensor:
    """(..., E) states in ``bits`` bits, symmetric, with one scale for each; as numbers again."""
    most = 2 ** (bits - 1) - 1
    scale = states.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(states.dtype).tiny) / most
    return (states / scale).round() * scale


def distortion(low: Tensor, states: Tensor, eta: float) -> Tensor:
    """(...) ||low - states|| / (||states|| + eta) of (..., E)."""
    return (low - states).norm(dim=-1) / (states.norm(dim=-1) + eta)


def layer_sensitivity(file: Path | None, n_layers: int) -> Tensor:
    """(L,) float32 in 0..1: 0 for what lies at or below the 10th percentile of the layers, 1 from the 90th on.

    Raises:
        ValueError: the file does not hold one number of 0 or more for each layer.
    """
    if file is None:
        return torch.zeros(n_layers)
    numbers = json.loads(file.read_text(encoding="utf-8"))
    usable = isinstance(numbers, list) and all(isinstance(x, int | float) and x >= 0 for x in numbers)
    if not usable or len(numbers) != n_layers:
        raise ValueError(f"{file} must hold a JSON list of {n_layers} numbers of 0 or more, one for each decoder layer")
    measured = torch.tensor(numbers, dtype=torch.float32)
    low, high = torch.quantile(measured, torch.tensor([0.1, 0.9]))
    return ((measured - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
