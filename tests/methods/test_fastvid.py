"""Oracle: the attention written out; beside the recorded answers (test_oracles), what the exact budget changes."""

from __future__ import annotations

import math

import pytest
import torch

from ivcp_eval.interface import ModelFacts
from ivcp_eval.interface.ops import apportion
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods.fastvid import Method, frame_attention, split
from tests.methods.material import best, random_clips


def test_attention_of_the_mean_query() -> None:
    signals = random_clips((2, 2, 3), seed=1)
    query, key = signals.vision["query"].double(), signals.vision["joint_key"].double()
    heads, size = query.shape[1:]
    groups = key.shape[1] // size
    wanted = torch.zeros(12, dtype=torch.float64)
    for image in signals.images:
        tokens = image.tokens.tolist()
        for head in range(heads):
            mean = sum(query[token, head] for token in tokens) / len(tokens)
            first = head * groups // heads * size
            logits = [float(mean @ key[token, first : first + size]) / size**0.25 for token in tokens]
            total = sum(math.exp(logit) for logit in logits)
            for token, logit in zip(tokens, logits, strict=True):
                wanted[token] += math.exp(logit) / total / heads
    (clip,) = clips_of(signals)
    assert torch.allclose(frame_attention(signals, clip).double(), wanted, atol=1e-6)
    signals.vision = {**signals.vision, "cls": torch.arange(12.0)}
    assert frame_attention(signals, clip).tolist() == list(range(12))


def test_segments() -> None:
    alike = torch.tensor([0.9, 0.2, 0.95, 0.5, 0.91])
    assert split(alike, 1, 0.0) == [(0, 6)]
    assert split(alike, 2, 0.0) == [(0, 2), (2, 6)]
    assert split(alike, 1, 0.6) == [(0, 2), (2, 4), (4, 6)]
    assert split(alike, 99, 0.0) == [(t, t + 1) for t in range(6)]
    assert split(alike[:0], 8, 0.9) == [(0, 1)]
    assert split(torch.ones(129), 1, 0.9) == [(0, 64), (64, 128), (128, 130)]


@pytest.mark.parametrize("preset", ["llava_onevision", "llava_video"])
def test_nothing_is_added_where_the_released_counts_spend_all(preset: str) -> None:
    """10 of 40 tokens a frame: 6 salient ones and 4 anchors, whose groups come out even."""
    signals = random_clips((8, 5, 8), ratio=0.25, seed=2)
    exact, released = (
        make_method("fastvid", {"preset": preset, "counts": c}).select(signals) for c in ("ratio", "released")
    )
    assert exact.keep.tolist() == released.keep.tolist()
    assert exact.merge is not None
    assert released.merge is not None
    assert torch.equal(exact.merge.to_dense(), released.merge.to_dense())


def test_what_is_left_goes_to_the_tokens_of_most_attention() -> None:
    """All frames are a run, so the last one alone has salient tokens and anchors: half of it are anchors."""
    signals = random_clips((3, 4, 5), ratio=0.6, seed=4)
    signals.hidden[signals.visual] = signals.hidden[signals.visual[:20]].repeat(3, 1)
    parameters = {"preset": "qwen2_5_vl", "c": 1}
    released = make_method("fastvid", {**parameters, "counts": "released"}).select(signals)
    assert not released.exact
    assert signals.image[released.keep].bincount(minlength=3).tolist() == [0, 0, 20]
    exact = make_method("fastvid", parameters).select(signals)
    assert exact.keep.numel() == 36
    (clip,) = clips_of(signals)
    attention = frame_attention(signals, clip).tolist()
    # Of the last frame everything stays: 10 anchors and the 10 others; the other 16 are those of most attention.
    assert exact.keep.tolist() == [*best(attention[:40], 16), *range(40, 60)]


def test_a_picture() -> None:
    """3 salient tokens of 5, and 2 anchors that collect what is left."""
    signals = random_clips((0, 4, 5), ratio=0.25, seed=5)
    for preset in ("llava_onevision", "llava_video", "qwen2_5_vl"):
        selection = make_method("fastvid", {"preset": preset}).select(signals)
        (clip,) = clips_of(signals)
        salient = best(frame_attention(signals, clip).tolist(), 3)
        assert set(salient) < set(selection.keep.tolist())
        assert selection.merge is not None
        weights = selection.merge.to_dense()
        alone = [row for row, token in enumerate(selection.keep.tolist()) if token in salient]
        assert bool((weights[alone].count_nonzero(dim=1) == 1).all())
        assert int((weights > 0).any(dim=0).sum()) == 20, "nothing is lost"


@pytest.mark.parametrize("preset", ["llava_onevision", "llava_video", "qwen2_5_vl"])
@pytest.mark.parametrize("d", [0.0, 0.4, 1.0])
def test_a_frame_gives_no_more_than_it_has(preset: str, d: float) -> None:
    """The last frame has a newline more than the others."""
    sizes = [9, 9, 9, 10]
    for k in range(1, sum(sizes) + 1):
        budgets = apportion(k, sizes, sizes)
        method = Method(preset=preset, d=d)  # type: ignore[arg-type]
        salient, anchors = method.planned([(0, 3), (3, 4)], sizes, budgets, [0.99, 0.5, 0.1], method.preset)
        pairs = list(zip(salient, anchors, sizes, strict=True))
        assert all(s >= 0 <= a <= size - s for s, a, size in pairs)
        assert sum(salient) + sum(anchors) <= k


def test_positions_stay() -> None:
    for family, axes in (("llava", 1), ("qwen2_5_vl", 3)):
        (cut,) = make_method("fastvid").cuts(ModelFacts(family, 8, position_axes=axes), 0.25)
        assert (cut.renumber, cut.budget) == (False, "clip")


def test_the_family_decides_the_preset() -> None:
    signals = random_clips((9, 4, 5), ratio=0.3, seed=6)
    for family, preset in (("qwen2_5_vl", "qwen2_5_vl"), ("qwen3_vl", "qwen2_5_vl"), ("llava", "llava_onevision")):
        signals.family = family
        default, named = (make_method("fastvid", given).select(signals) for given in ({}, {"preset": preset}))
        assert default.keep.tolist() == named.keep.tolist()
