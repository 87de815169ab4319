"""Keeps the visual tokens on which information gathers when it flows along the likeness between tokens.

Paper: https://arxiv.org/abs/2603.22911 (ForestPrune; its selection inside one frame is G-Prune).
Reference: https://github.com/luminousllsa/ForestPrune @ 1686829 (llava/model/llava_arch_forest.py, ``gprune``)

A graph joins tokens of a cosine of 0.5 and more, each row a softmax of cosine / 0.03 over them. Lengths of the tokens
flow along it five times; what has arrived at a token, divided by the number of its neighbours, is its score. What
ForestPrune does with the half that is kept so is `forestprune`.

Differs: each image has its own budget, by the ratio; the released half of the tokens is what a ratio of 0.5 keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
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
        if not 0 < self.threshold <= 1 or not self.temperature > 0 or self.steps < 0:
            raise ValueError(
                f"threshold={self.threshold} must lie in (0, 1], temperature={self.temperature} be above 0, "
                f"steps={self.steps} 0 or more"
            )

    def choose(self, signals: Signals, image: Image) -> Tensor:
        """The tokens of the largest score."""
        return top(self.scores(embeddings(signals, image)), image.budget)

    def scores(self, states: Tensor) -> Tensor:
        """(N,) of states (N, E)."""
        unit = unit_rows(states)
        graph: Callable[[int, int], tuple[Tensor, Tensor]] = partial(self._graph, unit)
        if block_rows(len(unit)) >= len(unit):  # one block, which need not be made in every step
            graph = cache(graph)
        flow = states.float().norm(dim=1).nan_to_num(0, 0, 0)
        total, degree = _spread(graph, torch.ones_like(flow).repeat(2, 1), counted=True)
        total = total.clamp_min(1e-12)
        for _ in range(self.steps):
            flow = _spread(graph, (flow / total)[None])[0]
        return flow / degree.clamp_min(1)

    def _graph(self, unit: Tensor, first: int, behind: int) -> tuple[Tensor, Tensor]:
        """(R, M) weights of the rows ``first`` to ``behind`` and all behind ``first``, and which are neighbours."""
        shift = torch.full((), -1 / self.temperature, device=unit.device)  # 1 is the largest cosine
        graph = torch.addmm(shift, unit[first:behind], unit[first:].T, alpha=1 / self.temperature)
        near = graph >= (self.threshold - 1) / self.temperature
        return graph.exp_().mul_(near), near


def _spread(graph: Callable[[int, int], tuple[Tensor, Tensor]], flows: Tensor, counted: bool = False) -> Tensor:
    """(F, N) what arrives of ``flows`` (F, N) before rows are divided by their sums: the graph is symmetric then.

    Each pair of tokens is looked at once. ``counted``: the last flow sees every neighbour as 1.
    """
    arrived, n, size = torch.zeros_like(flows), flows.shape[1], block_rows(flows.shape[1])
    for first, behind in ((first, min(n, first + size)) for first in range(0, n, size)):
        weighted, near = graph(first, behind)
        for f, one in enumerate(flows):
            weights = near.float() if counted and f == len(flows) - 1 else weighted
            arrived[f, first:].addmv_(weights.T, one[first:behind])
            if behind < n:
                arrived[f, first:behind].addmv_(weights[:, behind - first :], one[behind:])
    return arrived
