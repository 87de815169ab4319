"""Keeps the visual tokens that dominate the vision tower's attention, and merges the others into a few by likeness.

Paper: https://arxiv.org/abs/2412.04467 (section 3.2: dominant token selection and contextual token merging).
Reference: https://github.com/dvlab-research/VisionZip @ 3151f6d (visionzip/clip_encoder.py), and its port to
Qwen2.5-VL in https://github.com/beomseokg/rotatek @ 71ef5f1 (attention of the last tower block, merged embeddings).

Dominant: the class token's attention in the tapped block where there is a class token, else the attention that a token
receives inside its image. Of the rest, every step-th token in order is a target; each other token joins the target
whose key (mean over heads) is nearest in cosine, and a target becomes itself plus the mean of its group.

Where there is a class token it takes one of the dominant places, as in the LLaVA code, which decides the targets.

Differs: the class token itself is not kept, since LLaVA's projector never sees it here; the place goes to the best
token that is neither dominant nor a target, which is still merged as well. Merging happens on the language model's
input embeddings, as in the Qwen2.5-VL port, not before the projector. Survivors are numbered anew, contextual tokens
last, as in the LLaVA code, where the language model gets the shorter embeddings; on M-RoPE, whose positions are places
in the image, they keep theirs. Attention and likeness are float32. Each image has its own budget, for which its tiles
compete, and attention stays inside an image or tile; the LLaVA-NeXT code gives every tile the same count and drops
newlines, here a newline ranks as the mean of its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, ModelFacts, Selection, Signal, Signals
from ivcp_eval.interface.ops import best_of_rest, itself, merged_selection, sparse_weights, top
from ivcp_eval.methods._at_input import in_output_order


@dataclass(frozen=True)
class Method(AbstractMethod):
    """VisionZip.

    Attributes:
        contextual: share of an image's budget that merged tokens take; 10 of 64 is published.
        renumber: number the survivors 0..n-1; None as released (not on M-RoPE), False is a variant.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    faithfulness: ClassVar[Faithfulness] = "faithful"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {"renumber": (None, True)}

    contextual: float = 10 / 64
    renumber: bool | None = None

    def __post_init__(self) -> None:
        """Refuse a share that leaves no dominant token."""
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual={self.contextual} is outside [0, 1)")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for every layer's cache, at the model's input where the family allows it."""
        return (Cut(model.first_cut, ratio, renumber=model.renumbers(self.renumber)),)

    def select(self, signals: Signals) -> Selection:
        """Dominant and contextual tokens of every image."""
        vision = signals.vision
        importance = vision["cls"] if "cls" in vision else vision["received"]
        kept, weights = [], []
        for image in signals.images:
            score, n_class = importance[image.tokens], int("cls" in vision)
            n_contextual = min(round(self.contextual * image.budget), image.budget - 1)
            dominant = top(score, image.budget - n_contextual - n_class)
            places, merge = contextual_tokens(vision["key"][image.tokens], dominant, n_contextual)
            whole = torch.cat((dominant, in_place_of_class(score, torch.cat((dominant, places)), n_class)))
            whole = whole.sort().values
            rows = torch.cat((itself(whole, merge.shape[1]), merge))
            placed = in_output_order(signals, torch.cat((whole, places)), rows)
            kept.append(placed[0])
            weights.append(placed[1])
        return Selection(*merged_selection(kept, weights, signals.images))


def in_place_of_class(score: Tensor, kept: Tensor, count: int) -> Tensor:
    """The ``count`` (0 or 1) best tokens by ``score`` (N,) that are not among ``kept``."""
    taken = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    taken[kept] = True
    return best_of_rest(score, taken, count)


def contextual_tokens(key: Tensor, dominant: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` targets among the tokens that are not dominant, and their merge weights.

    Args:
        key: (N, D). dominant: indices into N.

    Returns:
        (count,) indices into N; (count, N) sparse: 1 for the target, 1/size for each member of its group.
    """
    n = key.shape[0]
    rest = torch.ones(n, dtype=torch.bool, device=key.device)
    rest[dominant] = False
    others = rest.nonzero().flatten()
    if not count:
        return others[:0], itself(others[:0], n)
    step = max(1, others.numel() // count)
    targets = others[::step][:count]
    rest[targets] = False
    members = rest.nonzero().flatten()
    unit = torch.nn.functional.normalize(key.float(), dim=-1)
    assigned = (unit[members] @ unit[targets].T).argmax(dim=1)
    sizes = torch.bincount(assigned, minlength=count).clamp_min(1)
    mean = sparse_weights(assigned, members, 1 / sizes[assigned].float(), (count, n))
    return targets, mean + itself(targets, n)
