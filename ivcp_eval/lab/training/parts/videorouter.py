"""VideoRouter's router of frames: which ones the question is about.

Neither its shape nor its training is public, so this is ours: before the layer that is cut, every frame keeps a grid of
every ``stride``-th token, and the rest of a frame's tokens have the frame's relevance as their gate: 1 or 0 for the
model, straight through, with the gradient of a sigmoid. The loss is the answer's and a price for dense frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivcp_eval.interface import Signals
from ivcp_eval.lab.training import part
from ivcp_eval.lab.training.frozen import Encoded, Frozen
from ivcp_eval.lab.training.gating import bounded, with_gradient_of
from ivcp_eval.lab.training.part import Loss
from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods._trained import FrameRouter
from ivcp_eval.methods.videorouter import Method, frame_states


class Part(part.Part):
    """Options: ``layer`` and ``stride`` of the method; ``price`` of keeping every frame whole; ``hidden``."""

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        super().__init__(frozen, options, example)
        self.method = Method(layer=options["layer"], stride=options["stride"])
        signals = frozen.signals(example, self.method, 0.5)
        self.net = FrameRouter(signals.hidden.shape[-1], options["hidden"]).to(signals.hidden.device)

    def loss(self, example: Encoded, rng: np.random.Generator, done: float) -> Loss:
        """The answer's, and the price of dense frames."""
        del rng, done
        shares: list[Tensor] = []
        dense: list[Tensor] = []

        def gate(signals: Signals) -> Tensor:
            gates = torch.ones(signals.n_visual, device=signals.visual.device)
            for clip in clips_of(signals):
                scores = self.net(frame_states(signals, clip), signals.hidden[signals.question])
                share, hard = scores.sigmoid(), (scores > 0).float()
                shares.append(share.mean())
                dense.append(hard.mean())
                sparse = [-(-size // int(self.method.stride)) for size in clip.sizes.tolist()]
                among = with_gradient_of(share, hard)[clip.frame]
                gates = gates.index_copy(0, clip.tokens, among.index_fill(0, clip.spread(sparse), 1.0))
            return bounded(gates)

        answer = self.frozen.answer_loss(example, self.method, 0.5, gate)
        share = torch.stack(shares).mean()
        figures = {"answer": answer.item(), "dense": torch.stack(dense).mean().item()}
        return answer + self.options["price"] * share, figures
