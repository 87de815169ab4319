"""Keeps, in stages, the visual tokens that the question's raters attend to, and recycles the best of the others.

Paper: https://arxiv.org/abs/2410.04417 (sections 3.2 to 3.4: raters, adaptive sparsification, token recycling).
Reference: https://github.com/Gumpest/SparseVLMs @ 26a5f48 (modelling_sparse_llama.py, score.py), rank rule @ 91fb6d9

Raters are the question tokens that the image embeddings match more than average: softmax over the text of H_v H_q^T,
mean over the image, at the model's input. After layers 2, 6 and 15 (of 32) the attention of that layer from the
raters, mean over heads, ranks the visual tokens. Of those that leave, the best 30 % are clustered by DPC-kNN, one
cluster for every ten, and each cluster lives on as its mean.

How many stay: with ``counts="ratio"`` the shares of the stages are read off the published lists for 192, 128, 96 and
64 tokens (of 576, recycled tokens included), between them linearly in the share that is left at the end. With
``counts="rank"``, the first release's rule, int(rank * scale + bias) of the raters' attention decides, whatever the
ratio, and there is a fourth stage after layer 19. Survivors are numbered anew in every stage, as in the released code.
That code knows LLaVA only: on M-RoPE, whose positions are places in the image, they keep theirs. Where they are
numbered anew the means stand behind the tokens that stay, as there; else at the places of their centres.

Differs: counts are published for four lists only; those of every other ratio, 0.5 and 0.75 among them, are the
interpolation above, and depths other than 32 layers are scaled. Each image has its own budget, which recycled tokens
are part of. Equal densities are told apart by index, not by noise. Scores, distances and means are float32. SparseVLM+
(v2.0) is not reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, ModelFacts, Selection, Signal, Signals
from ivcp_eval.interface.ops import (
    density_peaks,
    itself,
    mean_attention,
    merged_selection,
    ranking,
    sparse_weights,
    top,
)
from ivcp_eval.methods._at_input import in_output_order

# Tokens alive after each stage of the published lists [300, 200, 110], [303, 110, 36], [238, 48, 26], [66, 30, 17]
# on 576 tokens, with the recycled ones that the released rule adds.
PUBLISHED = ((309, 204, 113), (312, 117, 39), (249, 55, 27), (82, 32, 18))
PUBLISHED_TOKENS = 576
# Before layer k of 32: after the attention of layers 2, 6, 15, and in the first release 19.
DEPTHS = {"ratio": (3 / 32, 7 / 32, 16 / 32), "rank": (3 / 32, 7 / 32, 16 / 32, 20 / 32)}


@dataclass(frozen=True)
class Method(AbstractMethod):
    """SparseVLM.

    Attributes:
        depths: where the stages cut, as shares of the decoder's depth; None is the published 3, 7 and 16 of 32
            layers, with the rank rule 20 too.
        counts: "ratio" (exact budgets) or "rank" (the first release's adaptive rule, the ratio is ignored).
        scale, bias: of the rank rule; 13.5 and 0 are published for 192 tokens, 9 and 6 for 128, 0.8 and 0 for 64.
        recycle: keep means of clusters of what leaves.
        renumber: number the survivors 0..n-1 in every stage; None as released (not on M-RoPE). It changes which
            tokens later stages keep: False is a variant.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key"})
    faithfulness: ClassVar[Faithfulness] = "faithful"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {"renumber": (None, True), "recycle": (True,)}

    depths: tuple[float, ...] | None = None
    counts: Literal["ratio", "rank"] = "ratio"
    scale: float = 13.5
    bias: float = 0.0
    recycle: bool = True
    renumber: bool | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if self.counts not in ("ratio", "rank"):
            raise ValueError(f"counts {self.counts!r} is unknown; use 'ratio' or 'rank'")
        if self.depths is None:
            return
        object.__setattr__(self, "depths", tuple(self.depths))
        most = len(DEPTHS[self.counts])
        inside = 1 <= len(self.depths) <= most and all(0 <= depth < 1 for depth in self.depths)
        if not inside or list(self.depths) != sorted(set(self.depths)):
            raise ValueError(f"depths {self.depths} must be one to {most} increasing shares of the depth below 1")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """An observation of the input for the raters, then the stages; in a shallow model the last ones."""
        lowest = max(1, model.first_cut)
        depths = DEPTHS[self.counts] if self.depths is None else self.depths
        layers = sorted({max(lowest, round(depth * model.n_layers)) for depth in depths})
        layers = [layer for layer in layers if layer < model.n_layers]
        # The rank rule asks nobody for a share; its fourth stage only needs one.
        ratios = (*stage_ratios(ratio), *[ratio] * (len(DEPTHS[self.counts]) - 3))[-len(layers) :]
        stages = (
            Cut(layer, share, cache="from_cut", renumber=model.renumbers(self.renumber))
            for layer, share in zip(layers, ratios, strict=True)
        )
        return (Cut(0, 1.0), *stages)

    def select(self, signals: Signals) -> Selection:
        """Raters at the observation, then the best and the recycled tokens."""
        everything = torch.arange(signals.n_visual, device=signals.visual.device)
        if signals.stage == 0:
            signals.memory["raters"] = raters(signals)
            return Selection(everything)
        # Text tokens never leave, so their order among the text tokens names them at every stage.
        rows = signals.text[signals.memory["raters"]]
        if self.counts == "rank":
            return self._select_by_rank(signals, rows, everything)
        score = mean_attention(signals, rows)
        kept, weights = [], []
        for image in signals.images:
            n_kept = split_budget(image.tokens.numel(), image.budget) if self.recycle else image.budget
            states = signals.hidden[signals.visual[image.tokens]]
            recycling = keep_and_recycle(states, score[image.tokens], n_kept, image.budget - n_kept)
            places, merge = in_output_order(signals, *recycling)
            kept.append(places)
            weights.append(merge)
        return Selection(*merged_selection(kept, weights, signals.images))

    def _select_by_rank(self, signals: Signals, rows: Tensor, everything: Tensor) -> Selection:
        parts = [signals.attention(part)[:, :, signals.visual].mean(dim=0) for part in rows.split(64)]
        relation = torch.cat(parts)  # (raters, V)
        rank, n = int(torch.linalg.matrix_rank(relation)), signals.n_visual
        if rank == n:
            return Selection(everything, exact=False)
        n_kept = max(0, min(int(rank * self.scale + self.bias), n - 1))
        n_clusters = recycled(n - n_kept) if self.recycle else int(n_kept == 0)
        row = replace(signals.images[0], tokens=everything, budget=n_kept + n_clusters)
        states = signals.hidden[signals.visual]
        recycling = keep_and_recycle(states, relation.mean(dim=0), n_kept, n_clusters)
        places, merge = in_output_order(signals, *recycling)
        return Selection(*merged_selection([places], [merge], [row]), exact=False)


def stage_ratios(ratio: float) -> tuple[float, ...]:
    """Shares of the prompt's tokens after the three stages, so that ``ratio`` is left at the end."""
    points = [(1.0, 1.0, 1.0), *(tuple(n / PUBLISHED_TOKENS for n in counts) for counts in PUBLISHED), (0.0, 0.0, 0.0)]
    for above, below in pairwise(points):
        if below[2] <= ratio:
            t = (ratio - below[2]) / (above[2] - below[2])
            return tuple(min(1.0, low + t * (high - low)) for high, low in zip(above, below, strict=True))
    raise AssertionError(ratio)  # the last point is 0


def raters(signals: Signals) -> Tensor:
    """Indices into the row's text tokens of the question tokens that match the images more than average."""
    visual = signals.hidden[signals.visual].float()
    match = (visual @ signals.hidden[signals.question].float().T).softmax(dim=-1).mean(dim=0)
    chosen = signals.question[match > match.mean()]
    # Where all match alike (one question token), all rate.
    return torch.searchsorted(signals.text, chosen if chosen.numel() else signals.question)


def recycled(n_dropped: int) -> int:
    """Clusters that the released rule makes of ``n_dropped`` tokens: one in ten of the best 30 %."""
    return candidates(n_dropped) // 10 + 1 if n_dropped else 0


def candidates(n_dropped: int) -> int:
    """How many of the dropped tokens are clustered."""
    return min(n_dropped, int(n_dropped * 0.3) + 1)


def split_budget(n: int, budget: int) -> int:
    """How many of a budget are kept tokens, so that the clusters of what is dropped fill the rest (at least one)."""
    kept = budget
    while kept > 1 and kept + recycled(n - kept) > budget:
        kept -= 1
    return kept


def keep_and_recycle(states: Tensor, score: Tensor, n_kept: int, n_clusters: int) -> tuple[Tensor, Tensor]:
    """The best tokens, and the means of clusters of the next best at their centres.

    Args:
        states: (N, E) hidden states. score: (N,).

    Returns:
        (n_kept + n_clusters,) indices into N, and as many sparse merge weights (., N).
    """
    order = ranking(score)
    kept = top(score, n_kept)
    own = itself(kept, score.numel())
    if not n_clusters:
        return kept, own
    pool = order[n_kept : n_kept + max(n_clusters, candidates(score.numel() - n_kept))]
    centres, cluster = density_peaks(states[pool], n_clusters)
    sizes = torch.bincount(cluster, minlength=n_clusters).float()
    means = sparse_weights(cluster, pool, 1 / sizes[cluster], (n_clusters, score.numel()))
    return torch.cat((kept, pool[centres])), torch.cat((own, means))
