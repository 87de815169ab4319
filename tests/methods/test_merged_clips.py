"""Methods that merge over the frames of a video: exact budgets of every clip, and weights that stay inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ivcp_eval.engine.signals.source import images_at_cut
from ivcp_eval.interface import Cut, ModelFacts, Selection, Signals
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_clips
from tests.methods.test_clips import _with_a_newline
from tests.methods.test_memory import Largest

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("fastvid", {"preset": "llava_onevision"}),
    ("fastvid", {"preset": "llava_video"}),
    ("fastvid", {"preset": "qwen2_5_vl"}),
    ("holitom", {}),
    ("omnirefine", {}),
    ("prunevid", {}),
]
LAYOUTS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "one frame": ((1, 3, 4),),
    "two frames": ((2, 3, 4),),
    "a video": ((11, 4, 5),),
    "pictures and videos": ((0, 4, 4), (5, 3, 4), (0, 1, 1), (3, 2, 2), (1, 2, 3)),
}

every_variant = pytest.mark.parametrize(("name", "parameters"), VARIANTS)


def scene(signals: Signals, noise: float, seed: int = 0) -> Signals:
    """The same signals, but every frame of a clip is its first one and ``noise``, and the tower hears the same."""
    generator = torch.Generator().manual_seed(seed)
    hidden, vision = signals.hidden.clone(), {key: value.clone() for key, value in signals.vision.items()}
    for clip in signals.clips:
        for image in clip[1:]:
            first, now = clip[0].tokens, image.tokens
            states = hidden[signals.visual[first]]
            hidden[signals.visual[now]] = states + noise * torch.randn(states.shape, generator=generator)
            for value in vision.values():
                value[now] = value[first]
    return replace(signals, hidden=hidden, vision=vision)


def after(signals: Signals, selection: Selection, cut: Cut) -> Signals:
    """What the next cut sees of the tokens that stay."""
    keep, start = selection.keep, int(signals.visual[0])
    visual = torch.arange(keep.numel()) + start
    alive = torch.cat((torch.arange(start), signals.visual[keep], signals.text[start:]))
    hidden = signals.hidden.clone()
    if selection.merge is not None:
        hidden[signals.visual[keep]] = selection.merge.to_dense() @ signals.hidden[signals.visual]
    assert signals.columns is not None
    columns = signals.columns[keep]
    images = images_at_cut([image.span for image in signals.images], columns, cut.ratio, cut.budget)
    text = torch.cat((torch.arange(start), torch.arange(len(alive) - len(signals.text) + start, len(alive))))
    old = signals.attention
    assert signals.query is not None
    assert signals.key is not None
    return replace(
        signals,
        images=images,
        visual=visual,
        columns=columns,
        text=text,
        question=text[start:],
        hidden=hidden[alive],
        query=signals.query[:, alive],
        key=signals.key[:, alive],
        attention=lambda rows, entering=False: old(alive[rows], entering=entering)[:, :, alive],
        cut=cut,
        stage=signals.stage + 1,
    )


def every_stage(
    name: str, signals: Signals, ratio: float, **parameters: Any
) -> list[tuple[Signals, Selection, list[int]]]:
    """Signals and checked selection of each cut, and how many tokens of each clip it kept."""
    method, found = make_method(name, parameters), []
    cuts = method.cuts(ModelFacts("llava", 28), ratio)
    spans = [image.span for image in signals.images]
    images = images_at_cut(spans, signals.visual, cuts[0].ratio, cuts[0].budget)
    now = replace(signals, images=images, cut=cuts[0], memory={})
    for number, cut in enumerate(cuts):
        selection = method.select(now)
        selection.check(now, name)
        of_clip = torch.repeat_interleave(torch.tensor([sum(len(i.tokens) for i in clip) for clip in now.clips]))
        found.append((now, selection, torch.bincount(of_clip[selection.keep], minlength=len(now.clips)).tolist()))
        if number + 1 < len(cuts):
            now = after(now, selection, cuts[number + 1])
        assert cut.budget == "clip"
    return found


@every_variant
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise", [0.0, 0.3, None], ids=["equal frames", "alike frames", "other frames"])
def test_every_clip_keeps_its_budget(name: str, parameters: dict[str, Any], layout: str, noise: float | None) -> None:
    for ratio in (0.1, 0.25, 0.5, 0.9):
        signals = random_clips(*LAYOUTS[layout], ratio=ratio, seed=3)
        if noise is not None:
            signals = scene(signals, noise)
        for now, selection, counts in every_stage(name, signals, ratio, **parameters):
            assert now.cut is not None
            sizes = [max(1, frames) * rows * columns for frames, rows, columns in LAYOUTS[layout]]
            assert counts == [budget(now.cut.ratio, size) for size in sizes]
            assert selection.merge is None or of_own_clip(now, selection)


@every_variant
def test_a_newline_behind_a_video_counts_in_every_stage(name: str, parameters: dict[str, Any]) -> None:
    for ratio in (0.1, 0.3, 0.8):
        for now, _, counts in every_stage(name, _with_a_newline(ratio), ratio, **parameters):
            assert now.cut is not None
            assert counts == [budget(now.cut.ratio, size) for size in (19, 4)]


def of_own_clip(signals: Signals, selection: Selection) -> bool:
    """Whether every survivor is a mean, with weights of at least 0, of tokens of its own clip."""
    assert selection.merge is not None
    weights, clip = selection.merge.to_dense(), torch.zeros(signals.n_visual, dtype=torch.int64)
    for number, frames in enumerate(signals.clips):
        for image in frames:
            clip[image.tokens] = number
    own = clip[selection.keep][:, None] == clip
    inside = bool((weights >= 0).all()) and bool((weights[~own] == 0).all())
    return inside and torch.allclose(weights.sum(dim=1), torch.ones(len(weights)), atol=1e-5)


@every_variant
@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf])
def test_tokens_that_are_all_alike(name: str, parameters: dict[str, Any], value: float) -> None:
    signals = random_clips((6, 3, 4), (0, 3, 3), ratio=0.25)
    hidden = signals.hidden.clone()
    hidden[signals.visual] = value
    vision = {key: torch.full_like(states, value) for key, states in signals.vision.items()}
    signals = replace(signals, hidden=hidden, vision=vision)
    for ratio in (0.1, 0.5, 0.9):
        for now, _, counts in every_stage(name, signals, ratio, **parameters):
            assert now.cut is not None
            assert counts == [budget(now.cut.ratio, size) for size in (72, 9)]


@every_variant
def test_memory_is_linear_in_the_frames(name: str, parameters: dict[str, Any]) -> None:
    """Also where all frames are one scene."""
    numbers: list[int] = []
    method = make_method(name, {**parameters, "c": 1} if name == "fastvid" else parameters)
    for frames in (130, 260):
        signals = scene(random_clips((frames, 5, 6), ratio=0.25), noise=0.01)
        with Largest() as largest:
            selection = method.select(signals)
        entries = 0 if selection.merge is None else selection.merge.coalesce().values().numel()
        numbers.append(max(largest.numbers, entries))
    assert numbers[1] < 2.5 * numbers[0]


def test_a_still_video_is_merged_over_time() -> None:
    """All frames are one: half as many tokens as a frame has hold all of it."""
    signals = scene(random_clips((8, 3, 4), ratio=0.0625), noise=0.0)
    for name, parameters in (("holitom", {"inside": 1.0}), ("prunevid", {"alpha": 1.0})):
        ((now, selection, counts),) = every_stage(name, signals, 0.0625, **parameters)
        assert counts == [6]
        assert selection.merge is not None
        used = (selection.merge.to_dense() > 0).any(dim=0).view(8, 12)
        assert bool((used == used[0]).all()), "every frame gives the same places"
        assert now.clips[0][0].span.frame is not None


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("fastvid", {"preset": "llava"}, "preset='llava' must be one of llava_onevision, llava_video, qwen2_5_vl"),
        ("fastvid", {"counts": "all"}, "counts='all' of method 'fastvid' must be one of 'ratio', 'released'"),
        ("fastvid", {"p": 0}, "c=8 and p=0 must be 1 or more"),
        ("fastvid", {"d": 1.5}, "d=1.5 and beta=0.6 must lie in 0..1"),
        ("holitom", {"inside": 0}, r"beta=0.6 must lie in 0..1, inside=0 in \(0, 1\]"),
        ("holitom", {"layer": 0}, "layer=0 has no layer before it"),
        ("holitom", {"neighbours": 0}, "neighbours=0 and longest=1024 must be 1 or more"),
        ("prunevid", {"alpha": 0}, r"alpha=0 must lie in \(0, 1\]"),
        ("prunevid", {"layer": 0}, "layer=0 has no layer before it"),
    ],
)
def test_values_that_no_run_can_mean_are_refused(name: str, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_method(name, parameters)
