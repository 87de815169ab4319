"""Keeps visual tokens of key frames in which most pixels change and which the question attends to, by rank.

Paper: https://arxiv.org/abs/2605.19506 (EventPrune: event-triggered key frames, motion saliency, fusion of ranks).
Reference: none; the abstract

An event is a pixel whose logarithm of brightness differs by ``theta`` or more from the frame before. Frame after frame,
events add up until there are ``trigger`` a pixel since the last key frame: the next key frame, the first one being that
of the video. Before layer 2, each token of a video has a rank by its events and one by the attention of the question in
layer 1, mean over heads and words. The lowest weighted sum stays, of key frames first and of others where these are all
kept.

Differs: of the published system, which reads an event camera, nothing but the abstract is known. Events are simulated
from the frames that the model is shown, however far apart these are, so what moved between them is not seen, and all
constants are our choice: ``theta`` is usual in simulators, ``trigger`` and ``weight`` are not tuned. Tokens with as
many events share a rank. An event camera sees light before any camera curve; brightness is that of the pixels as
the family's published processors normalise them (the laboratory's do it otherwise and show less contrast, hence fewer
events). A picture has no events: the question's attention alone decides. Models whose visual tokens are no
rectangles of pixels are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Faithfulness, ModelFacts, Selection, Signal, Signals, TowerSignal
from ivcp_eval.interface.ops import mean_attention, ranking, top
from ivcp_eval.methods._clips import ROWS, Clip, ClipsAtInput

_STATE = "eventprune"


@dataclass(frozen=True)
class Method(ClipsAtInput):
    """EventPrune on simulated events.

    Attributes:
        layer: whose input is cut, by the attention of the layer before.
        theta: the least difference of the logarithm of brightness that is an event.
        floor: the least brightness of which a logarithm is taken, 1 being white.
        trigger: events a pixel, added up since the last key frame, that make a frame the next; 0 makes every frame one.
        weight: of the rank by events; the rest is that of the rank by attention.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key", "vision"})
    tower_signals: ClassVar[frozenset[TowerSignal]] = frozenset({"luma"})
    faithfulness: ClassVar[Faithfulness] = "variant"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    renumber: bool | None = False
    layer: int = 2
    theta: float = 0.2
    floor: float = 1 / 255
    trigger: float = 0.5
    weight: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if self.layer < 1:
            raise ValueError(f"layer={self.layer} has no layer before it whose attention could rank; use 1 or more")
        if self.theta <= 0 or not 0 < self.floor < 1 or self.trigger < 0 or not 0 <= self.weight <= 1:
            raise ValueError(
                f"theta={self.theta} must be more than 0, floor={self.floor} lie in (0, 1), trigger={self.trigger} be "
                f"0 or more, weight={self.weight} lie in 0..1"
            )

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut, for every layer's cache."""
        layer = max(1, model.first_cut, self.layer)
        return (Cut(layer, ratio, renumber=model.renumbers(self.renumber), budget="clip"),)

    def select(self, signals: Signals) -> Selection:
        """Video by video, by the attention of the whole row."""
        signals.memory[_STATE] = mean_attention(signals, signals.question)
        return super().select(signals)

    def choose(self, signals: Signals, clip: Clip) -> Tensor:
        """The best ranks, of key frames first."""
        luma = signals.vision["luma"]
        count = self.events(luma, clip)
        ranks = self.weight * shared_ranks(count)
        ranks += (1 - self.weight) * shared_ranks(signals.memory[_STATE][clip.tokens])
        pixels = clip.sizes * luma.shape[1:].numel()
        share = torch.zeros_like(pixels, dtype=count.dtype).index_add_(0, clip.frame, count) / pixels
        key = torch.tensor(key_frames(share.tolist(), self.trigger), device=ranks.device)
        return top(-(ranks + len(ranks) * ~key[clip.frame]), clip.budget)

    def events(self, luma: Tensor, clip: Clip) -> Tensor:
        """(N,) float32 how many events the pixels of each token have, from brightness ``luma`` (V, F, M) of the row.

        Of every frame of a step since the one before it, which for the first is the last of the step before.
        """
        before, found = clip.same_place(range(-1, len(clip.frames) - 1)), []
        for part in torch.arange(len(before), device=before.device).split(ROWS):
            now, other = luma[clip.tokens[part]].float(), before[part]
            last = luma[clip.tokens[other.clamp_min(0)], -1:].float()
            last = torch.where((other < 0)[:, None, None], now[:, :1], last)
            light = torch.cat((last, now), dim=1).clamp_min(self.floor).log()
            found.append((light.diff(dim=1).abs() >= self.theta).sum(dim=(1, 2)))
        return torch.cat(found).float()


def shared_ranks(score: Tensor) -> Tensor:
    """(N,) float32 how many have a better ``score`` (N,); equal scores share a rank, and NaN comes last."""
    order = ranking(score)
    value, place = score[order], torch.arange(len(order), device=order.device)
    first = torch.cat((value.new_ones(1, dtype=torch.bool), value[1:] != value[:-1]))
    ranks = torch.empty_like(place)
    ranks[order] = torch.where(first, place, 0).cummax(dim=0).values
    return ranks.float()


def key_frames(events: list[float], trigger: float) -> list[bool]:
    """Which frames are key frames, by the ``events`` a pixel of each; the first always is."""
    found, since = [], 0.0
    for number, count in enumerate(events):
        since += count
        found.append(number == 0 or since >= trigger)
        if found[-1]:
            since = 0.0
    return found
