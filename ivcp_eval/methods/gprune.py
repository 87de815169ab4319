"""Keeps the visual tokens on which information gathers when it flows along the likeness between tokens.

Paper: https://arxiv.org/abs/2603.22911 (ForestPrune; its selection inside one frame is G-Prune).
Reference: https://github.com/luminousllsa/ForestPrune @ 1686829 (llava/model/llava_arch_forest.py, ``gprune``)

A graph joins tokens of a cosine of 0.5 and more, each row a softmax of cosine / 0.03 over them. Lengths of the tokens
flow along it five times; what has arrived at a token, divided by the number of its neighbours, is its score. Trees over
frames, the other half of ForestPrune, say nothing on one image.

Differs: each image has its own budget, by the ratio; the released half of the tokens is what a ratio of 0.5 keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signals
from ivcp_eval.interface.ops import block_rows, top, unit_rows
from ivcp_eval.methods._at_input import AtInput, embeddings


@dataclass(frozen=True)
class Method(AtInput):
    """G-Prune.

    Attributes:
        threshold: cosine from which on two tokens are neighbours.
        temperature: of the softmax over a token's neighbours.
        steps: how often information flows.
    """

    faithfulness: ClassVar[Faithfulness] = "faithful"

    threshold: float = 0.5
    temperature: float = 0.03
    steps: int = 5

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if not self.temperature > 0 or self.steps < 0:
            raise ValueError(f"temperature={self.temperature} must be above 0, steps={self.steps} 0 or more")

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """The tokens of the largest score."""
        return top(self.scores(embeddings(signals, image)), image.budget)

    def scores(self, states: Tensor) -> Tensor:
        """(N,) of states (N, E)."""
        unit = unit_rows(states)
        flow = states.float().norm(dim=1).nan_to_num(0, 0, 0)
        degree = torch.ones_like(flow)
        for step in range(self.steps):
            arrived = torch.zeros_like(flow)
            for rows in torch.arange(len(unit), device=unit.device).split(block_rows(len(unit))):
                cosine = unit[rows] @ unit.T
                near = (cosine >= self.threshold) & (cosine.abs() >= 1e-6 * self.temperature)
                graph = (cosine / self.temperature).masked_fill(~near, -5000).softmax(dim=1)
                arrived += flow[rows] @ graph
                if step == 0:
                    degree[rows] = (graph > 0).sum(dim=1).float()
            flow = arrived
        return flow / degree
