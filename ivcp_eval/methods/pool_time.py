"""Averages the visual tokens of each place over stretches of neighbouring frames.

Differs: nothing to differ from; a control, to time what `pool` is to the grid. The places of a frame are averaged over
equally many stretches of the video; what the budget leaves over gives places spread evenly over the grid one stretch
more. With a budget of less than a frame there is one stretch, the whole video, and the cells of `uniform` are averaged
too. A mean stands in the middle of its tokens, whose position it keeps. A picture is pooled as by `pool`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.interface.ops import evenly, group_means, image_partition, place_in_group
from ivcp_eval.methods._clips import Clip, ClipsAtInput


@dataclass(frozen=True)
class Method(ClipsAtInput):
    """Average pooling over time."""

    faithfulness: ClassVar[Faithfulness] = "control"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    for_videos: ClassVar[bool] = True

    renumber: bool | None = False

    def choose(self, signals: Signals, clip: Clip) -> tuple[Tensor, Tensor]:
        """The mean of every stretch, at its middle."""
        middle = (len(clip.frames) - 1) // 2
        size = int(clip.sizes[middle])
        # What a frame has beyond the middle one's places (a newline behind the video) joins the last of these.
        place = clip.place.clamp_max(size - 1)
        if clip.budget < size:
            cells, centre = image_partition(replace(clip.frames[middle], budget=clip.budget))
            return clip.first[middle] + centre, group_means(cells[place], clip.budget)
        members = torch.bincount(place)
        stretches = _stretches(members.cpu(), clip.budget).to(members.device)
        order = place_in_group(torch.zeros_like(place), place)
        group = (stretches.cumsum(0) - stretches)[place] + order * stretches[place] // members[place]
        within = place_in_group(torch.zeros_like(group), group)
        centre = (within == ((torch.bincount(group) - 1) // 2)[group]).nonzero().flatten()
        return centre[group[centre].argsort()], group_means(group, clip.budget)


def _stretches(members: Tensor, budget: int) -> Tensor:
    """(P,) over how many stretches each place is averaged: ``budget`` in all, at most one per member."""
    counts = torch.zeros_like(members)
    while budget:
        can = (counts < members).nonzero().flatten()
        more = can if budget >= len(can) else can[evenly(len(can), budget)]
        counts[more] += 1
        budget -= len(more)
    return counts
