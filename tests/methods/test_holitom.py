"""Oracle: all ways to cut a video into windows, and merging in turn; beside the recorded answers (test_oracles)."""

from __future__ import annotations

import itertools

import pytest
import torch

from ivcp_eval.interface import ModelFacts
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods.holitom import best_windows, merged_in_turn
from tests.methods.material import best, random_clips
from tests.methods.test_merged_clips import every_stage, scene


@pytest.mark.parametrize("longest", [1, 3, 99])
def test_windows_save_most(longest: int) -> None:
    for frames, seed in itertools.product((1, 2, 6, 8), range(4)):
        still = torch.rand(frames - 1, 7, generator=torch.Generator().manual_seed(seed)) < 0.6
        most = 0
        for ends in itertools.product((False, True), repeat=frames - 1):
            edges = [0, *[t + 1 for t, end in enumerate(ends) if end], frames]
            spans = list(itertools.pairwise(edges))
            if max(b - a for a, b in spans) <= longest:
                most = max(
                    most, sum(int(still[a : b - 1].all(dim=0).sum()) * (b - a - 1) for a, b in spans if b > a + 1)
                )
        windows, saved = best_windows(still, longest)
        assert saved == most
        assert [frame for a, b in windows for frame in range(a, b)] == list(range(frames))
        assert all(b - a <= longest for a, b in windows)
        assert saved == sum(int(still[a : b - 1].all(dim=0).sum()) * (b - a - 1) for a, b in windows if b > a + 1)


def test_later_ones_weigh_more() -> None:
    states = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([1, 4, 9])
    unit = states / states.norm(dim=1, keepdim=True)
    wanted = states.clone()
    for token in range(12):
        if token not in kept:
            nearest = int(kept[(unit[kept] @ unit[token]).argmax()])
            wanted[nearest] = (wanted[nearest] + states[token]) / 2
    _, weights = merged_in_turn(states, kept)
    assert torch.allclose(weights.to_dense() @ states, wanted[kept], atol=1e-5)


@pytest.mark.parametrize(("ratio", "before"), [(0.05, 0.1), (0.125, 0.25), (0.25, 0.5), (0.64, 0.8)])
def test_stages(ratio: float, before: float) -> None:
    outer, inner = make_method("holitom").cuts(ModelFacts("llava_onevision", 28), ratio)
    assert (outer.layer, inner.layer, inner.ratio, inner.cache) == (0, 18, ratio, "from_cut")
    assert (outer.ratio, outer.renumber, inner.renumber) == (pytest.approx(before), True, False)
    (only,) = make_method("holitom", {"inside": 1}).cuts(ModelFacts("llava_onevision", 28), ratio)
    assert only.ratio == ratio


def test_every_part_gives_its_share() -> None:
    """Of 12 still and 8 moving places the first stage keeps half of a still video's window and of every frame."""
    signals = random_clips((4, 4, 5), ratio=22 / 80, seed=1)
    moved = signals.hidden.clone()
    still = scene(signals, noise=0.0).hidden
    for image in signals.images:
        columns = signals.visual[image.tokens]
        moved[columns[:12]] = still[columns[:12]]
    signals.hidden = moved
    selection = make_method("holitom", {"inside": 1.0, "tau": 0.99}).select(signals)
    assert selection.merge is not None
    shared = (selection.merge.to_dense() > 0).view(22, 4, 20).any(dim=2).sum(dim=1)
    assert shared.tolist() == [4] * 6 + [1] * 16
    received = signals.vision["received"]
    moving = [
        token + 20 * t
        for t in range(4)
        for token in (12 + i for i in best(received[20 * t + 12 : 20 * t + 20].tolist(), 4))
    ]
    # The rows of the first frame come still ones first; each frame's own ones are untouched.
    assert selection.merge.to_dense()[6:].argmax(dim=1).tolist() == moving


def test_a_picture_keeps_its_most_attended_tokens() -> None:
    signals = random_clips((0, 4, 5), ratio=0.5, seed=2)
    (_, first, _), (now, second, counts) = every_stage("holitom", signals, 0.25)
    assert first.keep.tolist() == best(signals.vision["received"].tolist(), 10)
    assert counts == [5]
    last = now.attention(torch.tensor([len(now.hidden) - 1]))[:, 0, now.visual].mean(dim=0)
    assert second.keep.tolist() == best(last.tolist(), 5)


def test_the_released_counts_are_not_exact() -> None:
    signals = scene(random_clips((6, 4, 5), ratio=0.3, seed=3), noise=0.0)
    selection = make_method("holitom", {"counts": "released"}).select(signals)
    assert not selection.exact
    assert selection.keep.tolist() == list(range(20)), "a still video is one frame, whatever the ratio"
    (clip,) = clips_of(signals)
    assert clip.budget == 36
