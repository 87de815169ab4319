"""Merges the visual tokens most like each other, pair by pair, until the budget is met.

Paper: https://arxiv.org/abs/2210.09461 (ToMe, section 3: bipartite soft matching).
Reference: https://github.com/facebookresearch/ToMe @ af95e4b (tome/merge.py)

Every second token looks for the one most like it among the others, by the cosine of the tower's keys, mean over heads;
those that found the best match are merged into it, weighted by how many tokens each stands for.

Differs: ToMe merges in every block of the tower, between attention and MLP; here it is done once, on the language
model's input embeddings ("post"), so this is a variant. At most half of the tokens can be merged at a time: below that
there are several rounds, each on the weighted means of the keys. Tokens keep the order of the image, a merged one the
place of the token that the other was merged into. Each image has its own budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import block_rows, ranking, sparse_weights, unit_rows
from ivcp_eval.methods._at_input import AtInput


@dataclass(frozen=True)
class Method(AtInput):
    """ToMe at the language model's input."""

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"key"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    def choose(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """Rounds of matching; the weights are the sizes of the groups."""
        key = signals.vision["key"][image.tokens].float()
        n, group = key.shape[0], torch.arange(key.shape[0], device=key.device)
        size = torch.ones_like(group).float()
        places = group
        while places.numel() > image.budget:
            into = matched(key, min(places.numel() // 2, places.numel() - image.budget))
            stays = (into == torch.arange(into.numel(), device=into.device)).nonzero().flatten()
            new = torch.empty_like(into)
            new[stays] = torch.arange(stays.numel(), device=into.device)
            new = new[into]  # where each token of this round went
            total = torch.zeros(stays.numel(), key.shape[1], device=key.device).index_add_(0, new, key * size[:, None])
            size = torch.zeros(stays.numel(), device=key.device).index_add_(0, new, size)
            key, places, group = total / size[:, None], places[stays], new[group]
        members = torch.arange(n, device=group.device)
        return places, sparse_weights(group, members, 1 / size[group], (places.numel(), n))


def matched(metric: Tensor, r: int, class_token: bool = False) -> Tensor:
    """(N,) the token that each of ``metric`` (N, D) is merged into, itself for all but ``r`` tokens of even place.

    ``class_token``: token 0 stays.
    """
    unit = unit_rows(metric)
    even, odd = unit[::2], unit[1::2]
    best, likeness = [], []
    for rows in even.split(block_rows(len(unit))):
        found = (rows @ odd.T).max(dim=1)
        best.append(found.indices)
        likeness.append(found.values)
    score = torch.cat(likeness)
    if class_token:
        score[0] = -torch.inf
    merged = ranking(score)[:r]
    into = torch.arange(len(unit), device=unit.device)
    into[2 * merged] = 2 * torch.cat(best)[merged] + 1
    return into
