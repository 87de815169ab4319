"""Averages what stands still in scenes of a video, clusters what is left, then keeps what the question attends to.

Paper: https://arxiv.org/abs/2412.16117 (section 3: spatial-temporal token merging, question-guided selection).
Reference: https://github.com/Visual-AI/PruneVid @ b12600c (models/pllava/modeling_pllava.py,
models/pllava/elastic_cache.py)

Frames, each the mean of its tokens, are clustered by DPC-kNN (7 neighbours), one cluster for every four frames; a
window is a run of frames of one cluster, after runs that are not their cluster's longest have joined a neighbour. A
place stands still where the mean cosine of its tokens in all pairs of the window's frames is above tau. Before the
language model the tokens of such places become their mean over the window; these, and the others frame by frame, are
clustered by DPC-kNN, and each cluster lives on as its mean at its centre. After layer 10 (of 32) a token's score is the
largest attention that any word of the question pays it in any head, without positions and causal mask; of each part,
still or moving in one frame, the same share stays, in the caches of all layers.

The retention ratio is what is left at the end: after layer 10 two fifths of what was merged, as published; above a
ratio of 0.16, the square root of it.

A picture is a video of one frame: its tokens are clustered, then ranked.

Differs: released is a fixed share of clusters and no ratio. Here parts share an exact budget in proportion, and where
too much stands still the longest windows are halved until there are enough tokens. ``counts="released"`` leaves
``cluster_ratio`` of each part of more than 14 tokens, all of the others, then ``alpha`` of each, whatever the ratio.
Equal densities are told apart by index, not by noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Faithfulness, ModelFacts, Selection, Signal, Signals
from ivcp_eval.interface.ops import apportion, density_peaks, group_means, place_in_group, unit_rows
from ivcp_eval.methods._at_input import embeddings, in_output_order
from ivcp_eval.methods._clips import Clip, CountedClips, clips_of
from ivcp_eval.methods._windows import Window, check_layer, enough_parts, parts_of, shared_places, survivors, two_stages

NEIGHBOURS, SMALL = 7, 14


@dataclass(frozen=True)
class Method(CountedClips):
    """PruneVid.

    Attributes:
        counts: "ratio" (exact budgets) or "released" (shares of each part, whatever the ratio).
        tau: mean cosine above which a place stands still. temporal_segment_ratio: clusters of frames, as a share.
        cluster_ratio: share of a part that is left, with the released counts.
        alpha: share of the merged tokens that the stage inside the language model keeps; 1 leaves it out.
        layer: decoder layer before which that is; None is 11 of 32.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    tau: float = 0.8
    temporal_segment_ratio: float = 0.25
    cluster_ratio: float = 0.5
    alpha: float = 0.4
    layer: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        shares = (self.temporal_segment_ratio, self.cluster_ratio, self.alpha)
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(
                f"temporal_segment_ratio={shares[0]}, cluster_ratio={shares[1]} and alpha={shares[2]} must lie in "
                "(0, 1]"
            )
        check_layer(self.layer)

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One at the input, one inside the language model."""
        layer = round(11 / 32 * model.n_layers) if self.layer is None else self.layer
        return two_stages(model, ratio, self.alpha, layer, renumber=model.renumbers(self.renumber))

    def select(self, signals: Signals) -> Selection:
        """Merging at the input; the question's choice inside."""
        if signals.stage:
            return self._inside(signals)
        # 0 for newlines behind videos, and for what a wrapper (`NAME+ivc`) keeps beside the clusters
        signals.memory["part"] = torch.zeros_like(signals.visual)
        signals.memory["columns"] = signals.columns
        return super().select(signals)

    def choose(self, signals: Signals, clip: Clip) -> tuple[Tensor, Tensor]:
        """Clusters of still and moving tokens; notes for the second stage which part each is of."""
        kept, weights, counts = self.merged(embeddings(signals, clip), clip)
        part = torch.arange(1, len(counts) + 1).repeat_interleave(torch.tensor(counts)).to(kept.device)
        placed, weights = in_output_order(signals, kept, weights)
        signals.memory["part"][clip.tokens[placed]] = part
        return placed, weights

    def merged(self, states: Tensor, clip: Clip) -> tuple[Tensor, Tensor, list[int]]:
        """(K,) what stays of a clip, in the released order, sparse weights (K, N), and survivors of each part."""
        frames = torch.arange(len(states), device=states.device).split(clip.sizes.tolist())
        places = shared_places(frames)

        def still(window: Window) -> Tensor:
            return mean_cosines(states[places[slice(*window)]]) > self.tau

        windows = windows_of(frame_labels(states, frames, self.temporal_segment_ratio))
        if self.exact:
            parts = enough_parts(frames, windows, still, clip.budget)
            sizes = [part.shape[1] for part in parts]
            counts = apportion(clip.budget, sizes, sizes)
        else:
            parts = [part for window in windows for part in parts_of(frames, window, still(window))]
            sizes = [part.shape[1] for part in parts]
            counts = [int(size * self.cluster_ratio) if size > SMALL else size for size in sizes]
        chosen = [clustered(states[part].float().mean(dim=0), count) for part, count in zip(parts, counts, strict=True)]
        return *survivors(parts, chosen, len(states)), counts

    def _inside(self, signals: Signals) -> Selection:
        assert signals.columns is not None
        score, clips = question_attention(signals), clips_of(signals)
        known = torch.searchsorted(signals.memory["columns"], signals.columns)
        part = signals.memory["part"][known.to(score.device)]
        chosen = [self.of_parts(score[clip.tokens], part[clip.tokens], clip.budget) for clip in clips]
        return self.selection(chosen, clips)

    def of_parts(self, score: Tensor, part: Tensor, budget: int) -> Tensor:
        """Of each ``part`` (N,) its share of the best tokens by ``score`` (N,), increasing."""
        sizes = torch.bincount(part).tolist()
        counts = apportion(budget, sizes, sizes) if self.exact else [int(n * self.alpha) for n in sizes]
        return (place_in_group(score, part) < torch.tensor(counts, device=part.device)[part]).nonzero().flatten()


def frame_labels(states: Tensor, frames: Sequence[Tensor], share: float) -> list[int]:
    """The cluster of each frame, by the means of their tokens (N, E), in stretches that belong together."""
    means = torch.stack([states[frame].float().mean(dim=0) for frame in frames])
    _, cluster = density_peaks(means, max(1, int(len(frames) * share)), NEIGHBOURS)
    return refined(cluster.tolist())


def refined(labels: list[int]) -> list[int]:
    """Labels of frames of which only each one's longest run stays, if it is longer than 1; the others join a neighbour.

    The one whose run is longer, so far; the left of equal ones; 0 where there is none.
    """
    runs = [(label, len(list(group))) for label, group in groupby(labels)]
    longest = dict(sorted(runs, key=lambda run: run[1]))
    now = [label if n == longest[label] > 1 else None for label, n in runs for _ in range(n)]
    stretches, start = [], 0
    for label, group in groupby(now):
        stop = start + len(list(group))
        if label is None:
            stretches.append((start, stop))
        start = stop
    for start, stop in stretches:
        before, after = _leading(now[:start][::-1]), _leading(now[stop:])
        label = 0 if not before + after else now[start - 1] if before >= after else now[stop]
        now[start:stop] = [label] * (stop - start)
    return [label for label in now if label is not None]


def _leading(labels: Sequence[int | None]) -> int:
    """How many are equal to the first."""
    return next((i for i, label in enumerate(labels) if label != labels[0]), len(labels))


def windows_of(labels: Sequence[int]) -> list[Window]:
    """Runs of equal labels."""
    edges = [i for i in range(len(labels)) if not i or labels[i] != labels[i - 1]]
    return list(zip(edges, [*edges[1:], len(labels)], strict=True))


def mean_cosines(states: Tensor) -> Tensor:
    """(M,) mean cosine of all pairs of different frames, of states (W, M, E); 0 of a single frame."""
    length = len(states)
    unit = unit_rows(states.flatten(0, 1)).view(states.shape)
    pairs = unit.sum(dim=0).square().sum(dim=-1) - unit.square().sum(dim=(0, 2))
    return pairs / max(1, length * (length - 1))


def clustered(states: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Centres of ``count`` clusters of ``states`` (n, E), best first, and the sparse weights of their means."""
    if count in (0, len(states)):
        return torch.arange(count, device=states.device), None
    centres, cluster = density_peaks(states, count, NEIGHBOURS)
    return centres, group_means(cluster, count)


def question_attention(signals: Signals, chunk: int = 64) -> Tensor:
    """(V,) the largest attention of any token of the question, in any head, without positions and causal mask."""
    assert signals.query is not None
    assert signals.key is not None
    key = signals.key.float()
    query = signals.query[:, signals.question].float().unflatten(0, (len(key), -1)) * key.shape[-1] ** -0.5
    most = torch.zeros(signals.n_visual, device=key.device)
    for part in query.split(chunk, dim=2):
        attention = torch.einsum("ghrd,gnd->ghrn", part, key).softmax(dim=-1)[..., signals.visual]
        most = torch.maximum(most, attention.amax(dim=(0, 1, 2)))
    return most
