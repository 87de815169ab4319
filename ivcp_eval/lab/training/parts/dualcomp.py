"""DualComp's router: from a picture and a question to the split lambda and the rate rho.

Neither its training nor a differentiable form of its two streams is public, so this is ours. Two numbers decide, so
their slopes are measured: both are moved up or down together, by signs drawn for each example, and the loss is that of
the answer under what the two streams keep there and at the opposite point. The loss is the answer's and a price for
rho. By gradients of the gates of single tokens, as selectors learn, the router came to keep nothing, while the loss
rose and even where keeping cost nothing (docs/design/training.md).
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
from ivcp_eval.lab.training.gating import with_gradient_of
from ivcp_eval.lab.training.part import Loss
from ivcp_eval.lab.training.parts._selector import Tower
from ivcp_eval.methods._at_input import embeddings, grid_of, importance, relevance
from ivcp_eval.methods._trained import Router
from ivcp_eval.methods.dualcomp import Method


class Attention(Tower):
    """Looks at the vision tower's attention."""

    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls"})


class Part(part.Part):
    """Options: ``price`` of keeping everything; ``move``, of lambda, and of rho as a share of it; ``hidden``."""

    watch: ClassVar[AbstractMethod] = Attention()

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        super().__init__(frozen, options, example)
        self.method = Method()
        signals = frozen.signals(example, self.watch, 0.5)
        self.net = Router(signals.hidden.shape[-1], options["hidden"]).to(signals.hidden.device)

    def loss(self, example: Encoded, rng: np.random.Generator, done: float) -> Loss:
        """The answer's, and the price of what is kept."""
        del done
        move, price = self.options["move"], self.options["price"]
        signs = rng.choice((-1.0, 1.0), 2)
        answers: list[float] = []
        said: list[tuple[Tensor, Tensor]] = []
        for way in (1, -1):
            said.clear()

            def gate(signals: Signals, way: int = way) -> Tensor:
                gates = torch.ones(signals.n_visual, device=signals.visual.device)
                for image in signals.images:
                    with torch.enable_grad():
                        said.append(self.net(embeddings(signals, image), signals.hidden[signals.question]))
                    share, rate = (float(value.detach()) for value in said[-1])
                    moved = share + way * move * signs[0], rate * (1 + way * move * signs[1])
                    kept = self.kept(signals, image, *(min(1.0, max(0.0, value)) for value in moved))
                    gates[image.tokens] = kept
                return gates

            with torch.no_grad():
                answers.append(self.frozen.answer_loss(example, self.watch, 0.5, gate).item())
        share, rate = (torch.stack(values).mean() for values in zip(*said, strict=True))
        slope = (answers[0] - answers[1]) / (2 * move)
        line = slope * signs[0] * share + (slope * signs[1] / rate.detach() + price) * rate
        answer = sum(answers) / 2
        figures = {"answer": answer, "lambda": share.item(), "rho": rate.item()}
        return with_gradient_of(line, answer + price * rate.detach()), figures

    def kept(self, signals: Signals, image: Image, share: float, rate: float) -> Tensor:
        """(N,) gates of an image's tokens, 1 or 0."""
        n = image.tokens.numel()
        k = min(n, max(1, round(rate * n)))
        n_path = round(share * k)
        peaks, path = self.ranked(signals, image, k - n_path, n_path)
        gates = torch.zeros(n, device=signals.visual.device)
        gates[peaks[: k - n_path]] = 1
        gates[path[:n_path]] = 1
        return gates

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
