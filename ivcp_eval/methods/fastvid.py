"""Keeps, of every frame of a video, what the vision tower attends to, and merges the rest into peaks of density.

Paper: https://arxiv.org/abs/2503.11187 (section 3: dynamic temporal segmentation, density spatiotemporal pruning).
Reference: https://github.com/LunarShen/FastVID @ a40a109 (modeling_qwen2.py of fastvid_llavaonevision and
fastvid_llavavideo, modeling_qwen2_5_vl.py of fastvid_qwen25vl)

A video is cut into segments where two frames that follow each other are unlike: at the 7 lowest cosines of their
features, and wherever it is below tau. Three fifths of the budget are the tokens of each frame that the tower attends
to most. The rest are anchors, the peaks of density (DPC-kNN, 4 neighbours) among the other tokens of a segment's last
frame and of every fourth before it. Each anchor frame collects the segment's other tokens anew: every one goes to the
anchor most like it, and an anchor becomes 0.6 of itself (or 1 / (1 + their number), if that is more) and the rest of
their mean. Positions stay.

The three published variants differ in what is counted. ``llava_onevision`` splits each frame's budget, and anchors are
among what they collect; ``llava_video`` splits a segment's; ``qwen2_5_vl`` splits it among the last frames of runs of
frames that are nearly equal (a cosine of ``ignore`` and more), and no frame has more anchors than half of its tokens.

A picture is a video of one frame: three fifths salient tokens, and two fifths anchors that collect the others.

Differs: the ratio is held exactly per video; what the released counts leave unspent (rounding, and the frames that
``qwen2_5_vl`` passes over) goes to the tokens of the video with most attention. ``counts="released"`` leaves it. The
LLaVA variants compare frames and rank tokens by SigLIP's pooling head, which the models here are loaded without: as in
the Qwen variant frames are compared by the mean of their embeddings, and tokens ranked by the attention of the frame's
mean query in the tower's own block; where there is a class token, by its attention. A segment is no longer than 64
frames, the longest published video, so that memory is linear in the frames. Equal densities are told apart by index,
not by noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import (
    best_of_rest,
    block_rows,
    density_peaks,
    place_in_group,
    ranking,
    sparse_weights,
    unit_rows,
)
from ivcp_eval.methods._at_input import embeddings
from ivcp_eval.methods._clips import Clip, CountedClips

Preset = Literal["llava_onevision", "llava_video", "qwen2_5_vl"]
Segment = tuple[int, int]  # first frame, frame behind the last

TAU: dict[Preset, float] = {"llava_onevision": 0.9, "llava_video": 0.9, "qwen2_5_vl": 0.84}
NEIGHBOURS, LONGEST = 4, 64


@dataclass(frozen=True)
class Method(CountedClips):
    """FastVID.

    Attributes:
        preset: whose counts; None is "qwen2_5_vl" on Qwen's families and "llava_onevision" elsewhere.
        counts: "ratio" (exact budgets) or "released" (never more than the ratio, often less).
        c: segments at least. tau: cosine of frames below which a segment ends; None is the preset's.
        d: share of anchors in the budget. p: every how many frames one has anchors. beta: least share of its own state
            in an anchor. ignore: cosine from which on frames of a segment are as good as one ("qwen2_5_vl").
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"cls", "query", "joint_key"})
    faithfulness: ClassVar[Faithfulness] = "faithful"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {"renumber": (False,)}

    renumber: bool | None = False
    preset: Preset | None = None
    c: int = 8
    tau: float | None = None
    d: float = 0.4
    p: int = 4
    beta: float = 0.6
    ignore: float = 0.95

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if self.preset not in (None, *TAU):
            raise ValueError(f"preset={self.preset!r} must be one of {', '.join(TAU)}, or None for the family's")
        if self.c < 1 or self.p < 1:
            raise ValueError(f"c={self.c} and p={self.p} must be 1 or more")
        if not 0 <= self.d <= 1 or not 0 <= self.beta <= 1:
            raise ValueError(f"d={self.d} and beta={self.beta} must lie in 0..1")

    def choose(self, signals: Signals, clip: Clip) -> tuple[Tensor, Tensor]:
        """By the embeddings and the tower's attention."""
        assert signals.cut is not None
        states = embeddings(signals, clip)
        means = torch.stack([frame.float().mean(dim=0) for frame in states.split(clip.sizes.tolist())])
        preset = self.preset or ("qwen2_5_vl" if signals.family.startswith("qwen") else "llava_onevision")
        return self.pruned(states, frame_attention(signals, clip), means, clip, signals.cut.ratio, preset)

    def pruned(
        self, states: Tensor, attention: Tensor, features: Tensor, clip: Clip, ratio: float, preset: Preset
    ) -> tuple[Tensor, Tensor]:
        """(K,) what stays of a clip, increasing, and the sparse weights (K, N) of what it becomes.

        Args:
            states: (N, E) of its tokens. attention: (N,) by which those of a frame rank. features: (T, E) of its
                frames. ratio: by which the released counts go.
        """
        sizes, unit = clip.sizes.tolist(), unit_rows(features)
        budgets = [frame.budget if self.exact else int(n * ratio) for frame, n in zip(clip.frames, sizes, strict=True)]
        alike = (unit[1:] * unit[:-1]).sum(dim=1)
        segments = split(alike, self.c, TAU[preset] if self.tau is None else self.tau)
        salient, anchors = self.planned(segments, sizes, budgets, alike.tolist(), preset)
        place = place_in_group(attention, clip.frame)
        first, reserved = (torch.tensor(counts, device=states.device) for counts in (salient, anchors))
        taken = place < first[clip.frame]
        if self.exact:
            closed = taken | (place >= (clip.sizes - reserved)[clip.frame])
            taken[best_of_rest(attention, closed, sum(budgets) - sum(salient) - sum(anchors))] = True
        return merged_into_anchors(states, taken, anchors, segments, sizes, self.beta, preset == "llava_onevision")

    def planned(
        self, segments: Sequence[Segment], sizes: list[int], budgets: list[int], alike: list[float], preset: Preset
    ) -> tuple[list[int], list[int]]:
        """Per frame how many salient tokens and how many anchors the released counts give it."""
        salient, anchors = [0] * len(sizes), [0] * len(sizes)
        by_run = preset == "qwen2_5_vl"
        for start, stop in segments:
            frames = list(range(start, stop))
            if by_run:  # the last frame of each run
                frames = [t for t in frames if t == stop - 1 or alike[t] < self.ignore]
            given = budgets[start:stop]
            holders = frames[::-1][:: self.p]
            if preset == "llava_onevision":
                own = [int(budget * self.d) for budget in given]
                of_frames = [budget - part for budget, part in zip(given, own, strict=True)]
                of_holders = [sum(own) // len(holders)] * len(holders)
            else:
                total = min(sum(given), max(int(sum(given) * self.d), int(by_run)))
                of_frames = evenly_split(sum(given) - total, len(frames))
                of_holders = evenly_split(total, len(holders))
            for t, count in zip(holders, of_holders, strict=True):
                anchors[t] = count
            for t, count in zip(frames, of_frames, strict=True):
                anchors[t] = min(anchors[t], sizes[t] // 2 if by_run else max(0, sizes[t] - count))
                salient[t] = min(count, sizes[t] - anchors[t])
        return salient, anchors


def evenly_split(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` whole numbers that differ by 1 at most, the larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def split(alike: Tensor, c: int, tau: float) -> list[Segment]:
    """Segments of T frames, at least ``c`` of them: by the cosines (T-1,) of each frame to the next."""
    ends = alike < tau
    ends[ranking(-alike)[: c - 1]] = True
    edges = [0, *(ends.nonzero().flatten() + 1).tolist(), len(alike) + 1]
    return [(at, min(at + LONGEST, stop)) for start, stop in pairwise(edges) for at in range(start, stop, LONGEST)]


def frame_attention(signals: Signals, clip: Clip) -> Tensor:
    """(N,) attention of the class token, or of the frame's mean query, to the tokens of each frame; mean over heads."""
    vision = signals.vision
    if "cls" in vision:
        return vision["cls"][clip.tokens]
    found = []
    for image in clip.frames:
        query = vision["query"][image.tokens].float().mean(dim=0)  # (H, D), times the root of what scales logits
        size = query.shape[1]
        key = vision["joint_key"][image.tokens].float().unflatten(1, (-1, size))
        logits = torch.einsum("ghd,ngd->ghn", query.unflatten(0, (key.shape[1], -1)), key) * size**-0.25
        found.append(logits.softmax(dim=2).mean(dim=(0, 1)))
    return torch.cat(found)


def merged_into_anchors(
    states: Tensor,
    salient: Tensor,
    anchors: list[int],
    segments: Sequence[Segment],
    sizes: list[int],
    beta: float,
    with_anchors: bool,
) -> tuple[Tensor, Tensor]:
    """(K,) salient tokens and anchors, increasing, and sparse (K, N) weights of what they become.

    Args:
        states: (N, E). salient: (N,) bool. anchors: per frame how many. with_anchors: the anchors of a frame are among
            what they collect; else only those of other frames are.
    """
    frames = torch.arange(len(states), device=states.device).split(sizes)
    kept, stays = salient.clone(), salient.nonzero().flatten()
    targets, sources, values = [stays], [stays], [torch.ones(len(stays), device=states.device)]
    for start, stop in segments:
        others = torch.cat(frames[start:stop])
        others = others[~salient[others]]
        unit = unit_rows(states[others])
        for frame, count in zip(frames[start:stop], anchors[start:stop], strict=True):
            if not count:
                continue
            free = frame[~salient[frame]]
            own = free[density_peaks(states[free], count, NEIGHBOURS)[0]].sort().values
            kept[own] = True
            anchor = torch.isin(others, own)
            collected = torch.ones_like(anchor) if with_anchors else ~anchor
            pool = others[collected]
            parts = unit[collected].split(block_rows(len(pool)))
            goal = torch.cat([(part @ unit[anchor].T).argmax(dim=1) for part in parts])
            number = torch.bincount(goal, minlength=len(own))
            weight = (1 / (number + 1)).clamp_min(beta)
            targets += [own, own[goal]]
            sources += [own, pool]
            values += [weight, ((1 - weight) / number.clamp_min(1))[goal]]
    row = kept.cumsum(0) - 1
    weights = (row[torch.cat(targets)], torch.cat(sources), torch.cat(values))
    return kept.nonzero().flatten(), sparse_weights(*weights, (int(kept.sum()), len(states)))
