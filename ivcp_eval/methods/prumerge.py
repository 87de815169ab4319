"""Keeps the visual tokens that CLIP's class token attends to most, each joined by the tokens most like it.

Paper: https://arxiv.org/abs/2403.15388 (section 3: adaptive important token selection, token supplement).
Reference: https://github.com/42Shawn/LLaVA-PruMerge @ 097c041 (llava/model/multimodal_encoder/clip_encoder.py)

The attention is that of the class token in the tower's last block, all heads taken as one. Each token that stays
becomes itself plus its 32 nearest neighbours (cosine of the keys of that block, heads joined), weighted by their
attention; one more token is the sum of all others, weighted likewise. They stand by descending attention, that token
last, where positions are numbered anew.

Differs: the budget says how many stay, the one for the others included; ``counts="outliers"`` is the released rule,
which knows no ratio. Merging happens on the language model's input embeddings, not before the projector. Each image
has its own budget; attention stays inside a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerFacts, TowerSignal, Unsupported
from ivcp_eval.interface.ops import best_of_rest, block_rows, ranking, sparse_weights, unit_rows
from ivcp_eval.methods._at_input import AtInput, in_output_order


@dataclass(frozen=True)
class Method(AtInput):
    """PruMerge.

    Attributes:
        counts: "ratio" (exact budgets), or "outliers": those above the third quartile by 1.5 interquartile ranges.
        neighbours: how many tokens join each that stays.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"joint_cls", "joint_key"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    counts: Literal["ratio", "outliers"] = "ratio"
    neighbours: int = 32

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if self.counts not in ("ratio", "outliers") or self.neighbours < 0:
            raise ValueError(
                f"counts={self.counts!r} must be 'ratio' or 'outliers', neighbours={self.neighbours} 0 or more"
            )

    @property
    def exact(self) -> bool:
        """Unless outliers are counted."""
        return self.counts == "ratio"

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        """The last block.

        Raises:
            Unsupported: there is no class token.
        """
        if not tower.class_token:
            raise Unsupported("its vision tower has no class token, by whose attention PruMerge ranks")
        return {"": tower.n_blocks - 1}

    def choose(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """The centres with what joins them, and one token for the rest."""
        attention, key = (signals.vision[name][image.tokens] for name in ("joint_cls", "joint_key"))
        centres = self.centres(attention, image.budget)
        return in_output_order(signals, *merged(attention, key, centres, self.neighbours))

    def centres(self, attention: Tensor, budget: int) -> Tensor:
        """Which tokens stay, by descending ``attention`` (N,); one place is left for the others."""
        count = n_outliers(attention) if self.counts == "outliers" else budget - int(1 < budget < attention.numel())
        return ranking(attention)[: max(1, count)]


def n_outliers(attention: Tensor) -> int:
    """How many values lie above the third quartile by more than 1.5 interquartile ranges."""
    low, high = attention.float().quantile(torch.tensor([0.25, 0.75], device=attention.device))
    return int((attention > high + 1.5 * (high - low)).sum())


def merged(attention: Tensor, key: Tensor, centres: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The places (K,) of the centres and of a token for the rest, and their sparse weights (K, N).

    Args:
        attention: (N,). key: (N, D). centres: (C,), in the order of the output. The token for the rest stands at the
            best place left; there is none if nothing is left, or if a single centre stays and nothing else was asked.
    """
    n, device = attention.numel(), attention.device
    unit, near = unit_rows(key), []
    for part in centres.split(block_rows(n)):
        likeness = unit[part] @ unit.T
        likeness[torch.arange(part.numel(), device=device), part] = -torch.inf
        near.append(likeness.topk(min(neighbours, n - 1), dim=1).indices)
    joined = torch.cat(near)
    rows = torch.arange(centres.numel(), device=device)
    taken = torch.zeros(n, dtype=torch.bool, device=device)
    taken[centres] = True
    rest = (~taken).nonzero().flatten()[: n if centres.numel() > 1 else 0]
    row = torch.cat((rows, rows.repeat_interleave(joined.shape[1]), torch.full_like(rest, centres.numel())))
    column = torch.cat((centres, joined.flatten(), rest))
    value = torch.cat((torch.ones_like(centres).float(), attention[joined.flatten()], attention[rest]))
    places = torch.cat((centres, best_of_rest(attention, taken, int(rest.numel() > 0))))
    return places, sparse_weights(row, column, value, (places.numel(), n))
