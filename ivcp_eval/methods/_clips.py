"""What methods share that choose among the tokens of a whole video before the language model runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import BudgetOf, Image, Selection, Signals
from ivcp_eval.interface.ops import apportion, image_partition, unit_rows
from ivcp_eval.methods._at_input import ChoosingAtInput, Chosen

ROWS = 2048  # of states in float32 at a time
NOTHING = -2.0  # in place of a cosine where there is nothing to compare with: less alike than anything


@dataclass(frozen=True)
class Clip:
    """A video's N alive tokens, frame after frame in row-major order; a picture is a video of one frame.

    Attributes:
        frames: its T images, one per grid step of the video.
    """

    frames: tuple[Image, ...]

    @cached_property
    def tokens(self) -> Tensor:
        """(N,) int64: as indices into the row's visual tokens."""
        return torch.cat([frame.tokens for frame in self.frames])

    @property
    def budget(self) -> int:
        """How many of them may survive."""
        return sum(frame.budget for frame in self.frames)

    @cached_property
    def sizes(self) -> Tensor:
        """(T,) int64: how many tokens each frame has."""
        return torch.tensor([frame.tokens.numel() for frame in self.frames], device=self.tokens.device)

    @cached_property
    def first(self) -> Tensor:
        """(T,) int64: the first token of each frame."""
        return self.sizes.cumsum(0) - self.sizes

    @cached_property
    def frame(self) -> Tensor:
        """(N,) int64: which frame each token is of, counted from 0."""
        return torch.arange(len(self.frames), device=self.sizes.device).repeat_interleave(self.sizes)

    @cached_property
    def place(self) -> Tensor:
        """(N,) int64: which of its frame's tokens each is."""
        return torch.arange(len(self.tokens), device=self.sizes.device) - self.first[self.frame]

    def same_place(self, other: Sequence[int] | Tensor) -> Tensor:
        """(N,) the token at the same place of another frame, or -1 where there is none.

        Args:
            other: (T,) for each frame the other one, -1 for none.
        """
        frame = torch.as_tensor(other, device=self.sizes.device)[self.frame]
        there = (frame >= 0) & (self.place < self.sizes[frame])
        return torch.where(there, self.first[frame] + self.place, -1)

    def spread(self, counts: Sequence[int]) -> Tensor:
        """(K,) increasing: of each frame as many tokens as ``counts`` (T,) says, spread evenly over its grid."""
        chosen = [self.tokens[:0]]
        spread: dict[Any, Tensor] = {}  # frames are mostly of one grid, and few numbers differ
        for frame, first, count in zip(self.frames, self.first.tolist(), counts, strict=True):
            size = frame.tokens.numel()
            if count == size:
                chosen.append(torch.arange(first, first + count, device=self.tokens.device))
            elif count:
                alike = frame.span.grid, size, count
                if alike not in spread:
                    spread[alike] = image_partition(replace(frame, budget=count))[1]
                chosen.append(first + spread[alike])
        return torch.cat(chosen)


@dataclass(frozen=True)
class Separators:
    """Newlines behind frames: tokens that show nothing of them, but tell them from what follows."""

    tokens: Tensor


@dataclass(frozen=True)
class ClipsAtInput(ChoosingAtInput):
    """Video by video: a budget of one frame may be spent in another.

    A newline behind a video stays, at the budget's cost. Released code adds it to what it has chosen.
    """

    budget_of: ClassVar[BudgetOf] = "clip"

    @abstractmethod
    def choose(self, signals: Signals, clip: Clip) -> Chosen:
        """Of the video's N tokens."""

    def select(self, signals: Signals) -> Selection:
        """What `choose` says of every video and picture."""
        parts: list[Clip | Separators] = []
        chosen: list[Chosen] = []
        for clip in clips_of(signals):
            shown, separators, n_kept = without_separators(clip)
            parts += [shown, separators]
            chosen += [self.choose(signals, shown), torch.arange(n_kept, device=clip.tokens.device)]
        return self.selection(chosen, parts)


@dataclass(frozen=True)
class CountedClips(ClipsAtInput):
    """Whose released code decides by itself how many stay.

    Attributes:
        counts: "ratio" (the user's budget, exactly) or "released".
    """

    counts: Literal["ratio", "released"] = "ratio"

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        check_counts(self.counts)

    @property
    def exact(self) -> bool:
        """Unless the released counts decide."""
        return self.counts == "ratio"


def clips_of(signals: Signals) -> list[Clip]:
    """The row's videos and pictures, in prompt order."""
    return [Clip(frames) for frames in signals.clips]


def without_separators(clip: Clip) -> tuple[Clip, Separators, int]:
    """The clip as its frames' grids show it, the other tokens of its frames, and how many of these stay.

    All of them, unless the budget is that small: one token is left to the grids.
    """
    shown = [_shown(frame) for frame in clip.frames]
    tokens = torch.cat([frame.tokens for frame in shown])
    separators = clip.tokens[~torch.isin(clip.tokens, tokens)]
    n_kept = min(len(separators), max(0, clip.budget - 1))
    sizes = [frame.tokens.numel() for frame in shown]
    budgets = apportion(clip.budget - n_kept, sizes, sizes) if len(separators) else [f.budget for f in shown]
    frames = tuple(replace(frame, budget=budget) for frame, budget in zip(shown, budgets, strict=True))
    return Clip(frames), Separators(separators), n_kept


def _shown(frame: Image) -> Image:
    """The frame of a video as one grid, where all of its tokens are alive and its family lays them out so."""
    span = frame.span
    if span.frame is None or span.grid is not None or frame.tokens.numel() != span.columns.numel():
        return frame
    views = span.lay_out(span)
    if len(views) != 1 or (views[0].cells < 0).any():
        return frame
    grid = views[0].cells.shape
    inside = torch.from_numpy(views[0].cells.ravel()).to(frame.tokens.device)
    of_grid = replace(span, columns=span.columns[inside.cpu()], grid=(grid[0], grid[1]))
    return replace(frame, tokens=frame.tokens[inside], n_prompt=inside.numel(), span=of_grid, view=None)


def cosines(states: Tensor, other: Tensor) -> Tensor:
    """(N,) cosine of each of ``states`` (N, E) to the one that ``other`` (N,) names; `NOTHING` where that is -1."""
    rows = torch.arange(len(states), device=states.device).split(ROWS)
    found = [(unit_rows(states[part]) * unit_rows(states[other[part]])).sum(dim=1) for part in rows]
    return torch.cat(found).masked_fill(other < 0, NOTHING)


def check_counts(counts: str, allowed: Sequence[str] = ("ratio", "released")) -> None:
    """Raise ValueError unless a method's parameter ``counts`` is one of ``allowed``."""
    if counts not in allowed:
        raise ValueError(f"counts={counts!r} must be one of {', '.join(map(repr, allowed))}")


def released_count(signals: Signals, clip: Clip, least: int) -> int:
    """How many of a video's tokens vLLM's pruners keep: a product rounded down, but at least ``least``.

    The pruning rate is 1 - ratio there, so the share that stays went through two subtractions, which decides some
    roundings (of 240 tokens at a rate of 0.9 it keeps 23).
    """
    assert signals.cut is not None
    rate = 1 - signals.cut.ratio
    return min(len(clip.tokens), max(least, int(len(clip.tokens) * (1 - rate))))


def in_turn(budget: int, sizes: Sequence[int], tiers: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens each frame keeps where the frames of one tier are filled, alike, before the next tier's.

    Args:
        sizes: (T,) tokens of each frame. tiers: of frames, each in one at most.
    """
    counts = [0] * len(sizes)
    for tier in tiers:
        limits = [sizes[frame] for frame in tier]
        given = min(budget, sum(limits))
        for frame, count in zip(tier, apportion(given, limits, limits), strict=True):
            counts[frame] = count
        budget -= given
    return counts
