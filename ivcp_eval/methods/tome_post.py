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
from ivcp_eval.interface.ops import sparse_weights, unit_rows
from ivcp_eval.methods._at_input import AtInput
from ivcp_eval.methods.tome import folded


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
            r = min(places.numel() // 2, places.numel() - image.budget)
            new, left = folded(unit_rows(key), r), places.numel() - r
            into = torch.empty_like(places[:left])
            into[new[::2]], into[new[1::2]] = places[::2], places[1::2]  # the second are those that are merged into
            order = into.argsort()
            new, places = order.argsort()[new], into[order]
            total = torch.zeros(left, key.shape[1], device=key.device).index_add_(0, new, key * size[:, None])
            size = torch.zeros(left, device=key.device).index_add_(0, new, size)
            key, group = total / size[:, None], new[group]
        members = torch.arange(n, device=group.device)
        return places, sparse_weights(group, members, 1 / size[group], (places.numel(), n))
