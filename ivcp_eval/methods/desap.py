"""Keeps the visual tokens whose surroundings match the question, then those that the vision tower attends to.

Paper: https://arxiv.org/abs/2604.11240 (decoupled similarity, visual saliency, merging).
Reference: none; no code is public, the formulas as a review of the paper cites them

In a late block of the tower the attention component A = softmax(Q Q^T / sqrt(d)) V, queries against queries, says what
is around a token; its cosine to the question's tokens is the text score. Half of the budget are the tokens of the
largest text score, the other half of the rest those of the largest attention of the class token (without one: received
attention). Each other token joins the one that stays most like it, and a group lives on as its mean.

Differs: in the paper V are the block's values, projected into the space of CLIP's text tower, which no model here
carries; here they are the language model's embeddings of the image, and the question's embeddings are the text. That
makes this a variant. Block, split and merging are not public: ``depth``, ``by_text``, ``words``; what merges is the
embeddings, nearest by cosine. Attention stays inside a tile or view. Each image has its own budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Image, Signal, Signals, TowerFacts, TowerSignal
from ivcp_eval.interface.ops import best_of_rest, block_rows, group_means, nearest_of, unit_rows
from ivcp_eval.methods._at_input import AtInput, embeddings, importance


@dataclass(frozen=True)
class Method(AtInput):
    """DeSAP on the language model's embeddings.

    Attributes:
        by_text: share of the budget that the text score fills; half, since neither of the two is said to weigh more.
        words: what a token is compared with: the "mean" of its cosines to all tokens of the question, or the "max".
        depth: of the block, as a share of the tower's blocks; None is the family's own, late one.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received", "cls", "query"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    by_text: float = 0.5
    words: Literal["mean", "max"] = "mean"
    depth: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if not 0 <= self.by_text <= 1 or (self.depth is not None and not 0 <= self.depth < 1):
            raise ValueError(f"by_text={self.by_text} must lie in 0..1, depth={self.depth} in [0, 1)")
        if self.words not in ("mean", "max"):
            raise ValueError(f"words={self.words!r} must be 'mean' or 'max'")

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        """The late block."""
        return {"": tower.own if self.depth is None else tower.at(self.depth)}

    def choose(self, signals: Signals, image: Image) -> tuple[Tensor, Tensor]:
        """By text, then by attention, and the means of what joins them."""
        states = embeddings(signals, image)
        around = unit_rows(attention_component(signals.vision["query"][image.tokens], states, image.view))
        text = unit_rows(signals.hidden[signals.question])
        cosine = around @ text.T
        score = cosine.mean(dim=1) if self.words == "mean" else cosine.amax(dim=1)
        score = score.masked_fill(~around.any(dim=1), torch.nan)
        taken = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        taken[best_of_rest(score, taken, round(self.by_text * image.budget))] = True
        taken[best_of_rest(importance(signals, image), taken, image.budget - int(taken.sum()))] = True
        kept = taken.nonzero().flatten()
        group = nearest_of(states, states[kept])
        group[kept] = torch.arange(kept.numel(), device=kept.device)
        return kept, group_means(group, kept.numel())


def attention_component(query: Tensor, values: Tensor, view: Tensor | None) -> Tensor:
    """(N, E) softmax(Q Q^T) of every head, mean over them, times ``values`` (N, E).

    Args:
        query: (N, H, D), scaled. view: (N,) whose tokens attend to each other only; None if all do.
    """
    query, values = query.nan_to_num(0, 0, 0), values.float().nan_to_num(0, 0, 0)
    found = torch.empty_like(values)
    for number in [None] if view is None else view.unique():
        inside = slice(None) if number is None else (view == number).nonzero().flatten()
        heads, own = query[inside].transpose(0, 1), values[inside]
        parts = heads.split(max(1, block_rows(len(own)) // len(heads)), dim=1)
        rows = [(part @ heads.transpose(1, 2)).softmax(dim=-1).mean(dim=0) @ own for part in parts]
        found[inside] = torch.cat(rows)
    return found
