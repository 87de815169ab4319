"""DualComp's router: from a picture and a question to the split lambda and the rate rho.

Neither its training nor a differentiable form of its two streams is public, so this is ours: each stream ranks its
tokens, and the i-th of them stays if i is below rho N (1 - lambda) or rho N lambda. The step there is made of a
sigmoid for the gradient, and straight through for what the model sees. The loss is the answer's and a price for rho.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Image, Signals, TowerSignal
from ivcp_eval.interface.ops import unit_rows
from ivcp_eval.lab.training import part
from ivcp_eval.lab.training.frozen import Encoded, Frozen
from ivcp_eval.lab.training.gating import bounded, with_gradient_of
from ivcp_eval.lab.training.part import Loss
from ivcp_eval.lab.training.parts._selector import Tower
from ivcp_eval.methods._at_input import embeddings, grid_of, importance, relevance
from ivcp_eval.methods._trained import Router
from ivcp_eval.methods.dualcomp import Method


class Attention(Tower):
    """Looks at the vision tower's attention."""

    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})


class Part(part.Part):
    """Options: ``price`` of keeping everything; ``soft``, the width of a step as a share of the tokens; ``hidden``."""

    watch: ClassVar[AbstractMethod] = Attention()

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        super().__init__(frozen, options, example)
        self.method = Method()
        signals = frozen.signals(example, self.watch, 0.5)
        self.net = Router(signals.hidden.shape[-1], options["hidden"]).to(signals.hidden.device)

    def loss(self, example: Encoded, rng: np.random.Generator, done: float) -> Loss:
        """The answer's, and the price of what is kept."""
        del rng, done
        shares: list[Tensor] = []
        rates: list[Tensor] = []

        def gate(signals: Signals) -> Tensor:
            gates = torch.ones(signals.n_visual, device=signals.visual.device)
            for image in signals.images:
                share, rate = self.net(embeddings(signals, image), signals.hidden[signals.question])
                shares.append(share)
                rates.append(rate)
                gates = gates.index_copy(0, image.tokens, self.kept(signals, image, share, rate))
            return gates

        answer = self.frozen.answer_loss(example, self.watch, 0.5, gate)
        rate = torch.stack(rates).mean()
        figures = {"answer": answer.item(), "lambda": torch.stack(shares).mean().item(), "rho": rate.item()}
        return answer + self.options["price"] * rate, figures

    def kept(self, signals: Signals, image: Image, share: Tensor, rate: Tensor) -> Tensor:
        """(N,) gates of an image's tokens."""
        n = image.tokens.numel()
        k = min(n, max(1, round(float(rate.detach()) * n)))
        n_path = round(float(share.detach()) * k)
        peaks, path = self.ranked(signals, image, k - n_path, n_path)
        hard = torch.zeros(n, device=share.device)
        hard[peaks[: k - n_path]] = 1
        hard[path[:n_path]] = 1
        soft = torch.zeros_like(hard)
        for ranked, length in ((peaks, n * rate * (1 - share)), (path, n * rate * share)):
            places = torch.arange(ranked.numel(), device=share.device) + 0.5
            soft = soft.index_add(0, ranked, ((length - places) / (self.options["soft"] * n)).sigmoid())
        return bounded(with_gradient_of(soft, hard))

    def ranked(self, signals: Signals, image: Image, n_peaks: int, n_path: int) -> tuple[Tensor, Tensor]:
        """The tokens of the semantic and of the geometric stream, best first, beyond what each keeps."""
        states, grid, n = embeddings(signals, image), grid_of(image), image.tokens.numel()
        attention = importance(signals, image).float().nan_to_num(0, 0, 0)
        count = min(n, max(1, round(self.method.clusters * n_peaks)))
        peaks = replace(self.method, clusters=1.0).semantic(unit_rows(states), attention, grid, count)[0]
        taken = torch.zeros(n, dtype=torch.bool, device=states.device)
        taken[peaks[:n_peaks]] = True
        walks = replace(self.method, regions=max(1, round(n_path * n_path / n)))
        path = walks.paths(states, relevance(signals, image), taken, grid, min(n - n_peaks, 2 * n_path + 1))
        return peaks, path
