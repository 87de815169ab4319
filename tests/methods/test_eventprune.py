"""Oracle: events, ranks and key frames pixel by pixel in Python; a video in which one square moves."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from ivcp_eval.interface import Signals
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods.eventprune import key_frames, shared_ranks
from tests.methods.material import best, random_clips, random_signals


def slow_events(signals: Signals, clip: int, theta: float = 0.2) -> list[list[int]]:
    """Of each frame its tokens' events."""
    luma, found = signals.vision["luma"].tolist(), []
    for number, image in enumerate(signals.clips[clip]):
        counts = []
        for place, token in enumerate(image.tokens.tolist()):
            shown = luma[token]
            if number:
                shown = [luma[int(signals.clips[clip][number - 1].tokens[place])][-1], *shown]
            steps = [(a, b) for one, other in itertools.pairwise(shown) for a, b in zip(one, other, strict=True)]
            counts.append(sum(abs(math.log(max(b, 1 / 255)) - math.log(max(a, 1 / 255))) >= theta for a, b in steps))
        found.append(counts)
    return found


def slow_choice(signals: Signals, clip: int, trigger: float) -> list[int]:
    frames, events = signals.clips[clip], slow_events(signals, clip)
    pixels = signals.vision["luma"][0].numel()
    since, key = 0.0, []
    for number, counts in enumerate(events):
        since += sum(counts) / (len(counts) * pixels)
        key.append(number == 0 or since >= trigger)
        since = 0.0 if key[-1] else since
    maps = signals.attention(signals.question)
    tokens = [int(token) for image in frames for token in image.tokens]
    seen = [float(maps[:, :, signals.visual[token]].mean()) for token in tokens]
    count = [n for counts in events for n in counts]
    is_key = [key[number] for number, image in enumerate(frames) for _ in image.tokens]
    rank = [
        sum(other > n for other in count) / 2 + sum(other > a + 1e-9 for other in seen) / 2
        for n, a in zip(count, seen, strict=True)
    ]
    order = best([-r - (0 if k else 1e6) for r, k in zip(rank, is_key, strict=True)], sum(i.budget for i in frames))
    return [tokens[i] for i in order]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("trigger", [0.0, 0.5, 3.0])
def test_choice(ratio: float, trigger: float) -> None:
    signals = random_clips((6, 3, 4), (0, 3, 3), (2, 2, 3), ratio=ratio, seed=2)
    selection = make_method("eventprune", {"trigger": trigger}).select(signals)
    selection.check(signals, "eventprune")
    for number, clip in enumerate(signals.clips):
        of_clip = torch.cat([image.tokens for image in clip])
        assert sum(image.budget for image in clip) == budget(ratio, len(of_clip))
        kept = selection.keep[torch.isin(selection.keep, of_clip)].tolist()
        assert kept == slow_choice(signals, number, trigger)


def test_a_picture_is_ranked_by_attention_alone() -> None:
    signals = random_signals((4, 5), ratio=0.3)
    signals.vision = {"luma": signals.vision["luma"][:, :1]}
    maps = signals.attention(signals.question).mean(dim=(0, 1))[signals.visual].tolist()
    assert make_method("eventprune").select(signals).keep.tolist() == best(maps, 6)


def test_key_frames() -> None:
    assert key_frames([0.0, 0.2, 0.2, 0.2, 0.0, 0.9, 0.1], 0.5) == [True, False, False, True, False, True, False]
    assert key_frames([0.0, 0.0], 0.5) == [True, False]


def test_frames_that_are_no_key_frames_leave_first() -> None:
    """A still video: its first frame is the only key frame."""
    signals = random_clips((4, 3, 4), ratio=0.25)
    signals.vision = {"luma": torch.full_like(signals.vision["luma"], 0.3)}
    assert make_method("eventprune").select(signals).keep.tolist() == list(range(12))


def test_ranks() -> None:
    assert shared_ranks(torch.tensor([1.0, 3.0, 1.0, torch.nan, 2.0, 3.0])).tolist() == [3, 0, 3, 5, 2, 0]


def test_what_moves_stays() -> None:
    """A grey clip in which one bright pixel goes from token to token: where it leaves and enters is an event."""
    signals = random_clips((4, 2, 4), ratio=7 / 32)
    luma = torch.full((32, 1, 4), 0.2)
    for frame in range(4):
        luma[8 * frame + frame, 0, 1] = 0.9
    signals.vision = {"luma": luma}
    keep = make_method("eventprune", {"trigger": 0.0, "weight": 1.0}).select(signals).keep
    assert keep.tolist() == [0, 8, 9, 17, 18, 26, 27]  # and the first of those without any


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"layer": 0}, "layer=0 has no layer before it"),
        ({"theta": 0.0}, "theta=0.0 must be more than 0"),
        ({"floor": 1.0}, "floor=1.0 lie in"),
        ({"trigger": -1.0}, "trigger=-1.0 be 0 or more"),
        ({"weight": 2.0}, "weight=2.0 lie in 0..1"),
    ],
)
def test_values_that_no_run_can_mean_are_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_method("eventprune", parameters)
