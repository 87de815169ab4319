"""Averages what stands still over stretches of a video and keeps what moves by attention, then merges once more inside.

Paper: https://arxiv.org/abs/2505.21334 (section 3: redundancy-aware temporal segmentation, merging before and inside
the language model).
Reference: https://github.com/cokeshao/HoliTom @ e9b2972 (holitom/llava_arch.py, holitom/modeling_qwen2.py)

A token stands still where its cosine to the one at the same place of the next frame is above tau. Windows of frames
are those for which (tokens that stand still all through it) x (frames - 1) sums to most: what averaging saves. Before
the language model the still tokens of a window become their mean over it, of which a share stays: the peaks of density
(DPC-kNN, 7 neighbours), each 0.6 of itself and 0.4 of the mean of those that join it, the nearest by distance. Of the
moving tokens of each frame the same share stays, by the attention they receive in the tower, unchanged. Before layer
18 (of 28) the last token's attention in the layer before picks half of them; the others are merged into those most
like them, in order: each time the state becomes the mean of itself and the one that comes. Positions stay there.

The retention ratio is what is left at the end. Before that stay twice as many, as published; above a ratio of 0.25,
the square root of it.

A picture is a video of one frame: nothing stands still, so its tokens of most attention stay.

Differs: the ratio is held exactly per video, every part (the still tokens of a window, the moving ones of a frame)
giving in proportion; the released code rounds each part, the moving ones up, and in a still video keeps fewer than
asked. Here the longest windows are halved until there are enough. ``counts="released"`` does as released. Merging
inside the language model stays inside a video. Equal densities are told apart by index, not by noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Faithfulness, ModelFacts, Selection, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import (
    apportion,
    density_peaks,
    group_means,
    last_token,
    mean_attention,
    nearest_of,
    place_in_group,
    sparse_weights,
    top,
    unit_rows,
)
from ivcp_eval.methods._at_input import embeddings, in_output_order
from ivcp_eval.methods._clips import Clip, CountedClips, clips_of
from ivcp_eval.methods._windows import Window, check_layer, enough_parts, parts_of, shared_places, survivors, two_stages


@dataclass(frozen=True)
class Method(CountedClips):
    """HoliTom.

    Attributes:
        counts: "ratio" (exact budgets) or "released" (parts rounded as released).
        tau: cosine above which a token stands still; None as published, 0.65 where a tenth or less stays before the
            language model, else 0.8.
        beta: share of its own state in a peak of density. plain_mean: a peak becomes the mean of its cluster instead.
        neighbours: of a token that its density is of. longest: frames of a window at most.
        inside: share of the tokens before it that the stage inside the language model keeps; 1 leaves it out.
        layer: decoder layer before which that is; None is 18 of 28.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"vision", "query", "key"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"received"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    tau: float | None = None
    beta: float = 0.6
    plain_mean: bool = False
    neighbours: int = 7
    longest: int = 1024
    inside: float = 0.5
    layer: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if not 0 <= self.beta <= 1 or not 0 < self.inside <= 1:
            raise ValueError(f"beta={self.beta} must lie in 0..1, inside={self.inside} in (0, 1]")
        if self.neighbours < 1 or self.longest < 1:
            raise ValueError(f"neighbours={self.neighbours} and longest={self.longest} must be 1 or more")
        check_layer(self.layer)

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One at the input, one deep in the language model."""
        layer = round(18 / 28 * model.n_layers) if self.layer is None else self.layer
        renumber = model.renumbers(self.renumber)
        return two_stages(model, ratio, self.inside, layer, renumber=renumber, cache="from_cut")

    def select(self, signals: Signals) -> Selection:
        """Windows at the input; attention and merging inside."""
        return super().select(signals) if signals.stage == 0 else self._inside(signals)

    def choose(self, signals: Signals, clip: Clip) -> tuple[Tensor, Tensor]:
        """Of still and moving tokens."""
        assert signals.cut is not None
        kept, weights = self.outer(
            embeddings(signals, clip), signals.vision["received"][clip.tokens], clip, signals.cut.ratio
        )
        return in_output_order(signals, kept, weights)

    def outer(self, states: Tensor, attention: Tensor, clip: Clip, ratio: float) -> tuple[Tensor, Tensor]:
        """(K,) what stays of a clip, in the released order, and the sparse weights (K, N) of what it becomes.

        Args:
            states: (N, E). attention: (N,), by which the moving tokens of a frame rank.
        """
        frames = torch.arange(len(states), device=states.device).split(clip.sizes.tolist())
        tau = self.tau if self.tau is not None else 0.65 if ratio <= 0.1 else 0.8
        still = stands_still(states, frames, tau)
        windows, saved = best_windows(still, self.longest)

        def all_through(window: Window) -> Tensor:
            return still[window[0] : window[1] - 1].all(dim=0)

        if self.exact:
            parts = enough_parts(frames, windows, all_through, clip.budget)
            sizes = [part.shape[1] for part in parts]
            counts = apportion(clip.budget, sizes, sizes)
        else:
            parts = [part for window in windows for part in parts_of(frames, window, all_through(window))]
            share = min(1.0, ratio / ((len(states) - saved) / len(states)))
            shares = [part.shape[1] * share for part in parts]
            counts = [round(n) if len(part) > 1 else math.ceil(n) for part, n in zip(parts, shares, strict=True)]
        chosen = [
            self._of_still(states[part].float().mean(dim=0), count)
            if len(part) > 1
            else (top(attention[part[0]], count), None)
            for part, count in zip(parts, counts, strict=True)
        ]
        return survivors(parts, chosen, len(states))

    def _of_still(self, means: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Peaks of density, by place, among the means (n, E) over a window, and what they become."""
        n, every = len(means), torch.arange(count, device=means.device)
        if count in (0, n):
            return every, None
        centres, cluster = density_peaks(means, count, min(self.neighbours, count))
        centres, order = centres.sort()
        group = order.argsort()[cluster]
        if self.plain_mean:
            return centres, group_means(group, count)
        joining = torch.ones(n, dtype=torch.bool, device=means.device)
        joining[centres] = False
        others = joining.nonzero().flatten()
        goal = group[others]
        number = torch.bincount(goal, minlength=count)
        own = torch.where(number > 0, self.beta, 1.0)
        values = torch.cat((own, ((1 - own) / number.clamp_min(1))[goal]))
        return centres, sparse_weights(torch.cat((every, goal)), torch.cat((centres, others)), values, (count, n))

    def _inside(self, signals: Signals) -> Selection:
        """Of each clip the tokens that the last one attends to; the others are merged into them."""
        attention, clips, chosen = mean_attention(signals, last_token(signals)), clips_of(signals), []
        for clip in clips:
            count = clip.budget if self.exact else round(self.inside * clip.tokens.numel())
            chosen.append(merged_in_turn(embeddings(signals, clip), top(attention[clip.tokens], count)))
        return self.selection(chosen, clips)


def stands_still(states: Tensor, frames: Sequence[Tensor], tau: float) -> Tensor:
    """(T-1, M) bool: where the cosine of the tokens (N, E) at one of M places to those of the next is above ``tau``."""
    places = shared_places(frames)
    pairs = pairwise(unit_rows(states[place]) for place in places)
    rows = [(now * after).sum(dim=1) > tau for now, after in pairs]
    return torch.stack(rows) if rows else places[:0].bool()


def best_windows(still: Tensor, longest: int) -> tuple[list[Window], int]:
    """The windows of T frames whose averaging saves most tokens, and how many these are; frames of none stand alone.

    Args:
        still: (T-1, M) which places stand still from each frame to the next. longest: frames of a window at most.
    """
    steps = still.cpu().numpy()
    saved, length, run = [0], [0], np.zeros(steps.shape[1], dtype=np.int64)
    for last in range(len(steps) + 1):
        run = (run + 1) * steps[last - 1] if last else run  # for how many steps each place has stood still
        through = run.size - np.bincount(run, minlength=last + 1).cumsum()[:last]  # by the steps, 1 to last
        number = np.arange(1, min(last, longest - 1) + 1)
        before = np.array(saved)[last - number]
        gain = np.concatenate(([saved[last]], before + number * through[: len(number)]))
        best = int(gain.argmax())  # of equal ones the shortest
        saved.append(int(gain[best]))
        length.append(best + 1)
    windows: list[Window] = []
    stop = len(steps) + 1
    while stop:
        windows.insert(0, (stop - length[stop], stop))
        stop -= length[stop]
    return windows, saved[-1]


def merged_in_turn(states: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """``kept`` (K,) and the sparse weights (K, N) of what they become as the other states (N, E) arrive in order.

    Each joins the one most like it, which becomes the mean of itself and what arrives: later ones weigh more.
    """
    n, k = len(states), len(kept)
    away = torch.ones(n, dtype=torch.bool, device=states.device)
    away[kept] = False
    others = away.nonzero().flatten()
    goal = nearest_of(states[others], states[kept])
    to_come = place_in_group(others, goal)
    values = torch.cat((0.5 ** torch.bincount(goal, minlength=k), 0.5 ** (to_come + 1)))
    rows = torch.cat((torch.arange(k, device=states.device), goal))
    return kept, sparse_weights(rows, torch.cat((kept, others)), values, (k, n))
