"""Oracle: relevance and counts with Python loops; the published strides at the budget that they add up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ivcp_eval.interface import ModelFacts, Signals
from ivcp_eval.interface.ops import budget, image_partition
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import pruned_columns, random_clips, random_signals, stock_attention


def slow_relevance(signals: Signals, clip: int) -> list[float]:
    """What a token of each frame gets of a word of the question."""
    maps, found = signals.attention(signals.question), []
    for image in signals.clips[clip]:
        columns = signals.visual[image.tokens].tolist()
        numbers = [float(maps[h, q, c]) for h in range(len(maps)) for q in range(maps.shape[1]) for c in columns]
        found.append(sum(numbers) / len(numbers))
    return found


def slow_counts(shares: list[float], sizes: list[int], total: int) -> list[int]:
    """Whole frames first, as long as a share is more than a frame; then largest remainders."""
    counts: dict[int, int] = {}
    left = dict(enumerate(shares))
    while True:
        unit = (total - sum(counts.values())) / sum(left.values())
        whole = [t for t in left if left[t] * unit >= sizes[t]]
        if not whole:
            break
        for t in whole:
            counts[t] = sizes[t]
            del left[t]
        if not left:
            return [counts[t] for t in range(len(sizes))]
    exact = {t: left[t] * unit for t in left}
    missing = total - sum(counts.values()) - sum(int(exact[t]) for t in left)
    up = sorted(left, key=lambda t: (int(exact[t]) - exact[t], t))[:missing]
    counts |= {t: int(exact[t]) + (t in up) for t in left}
    return [counts[t] for t in range(len(sizes))]


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_counts(ratio: float, seed: int) -> None:
    signals = random_clips((7, 3, 5), (0, 4, 4), (2, 2, 3), ratio=ratio, seed=seed)
    selection = make_method("videorouter").select(signals)
    selection.check(signals, "videorouter")
    for number, clip in enumerate(signals.clips):
        relevance, sizes = slow_relevance(signals, number), [len(image.tokens) for image in clip]
        mean = sum(relevance) / len(relevance)
        dense = [value > mean * 1.0001 for value in relevance]
        wanted = slow_counts(
            [n * (4 if d else 1) for n, d in zip(sizes, dense, strict=True)], sizes, budget(ratio, sum(sizes))
        )
        assert [int(torch.isin(selection.keep, image.tokens).sum()) for image in clip] == wanted


def test_the_published_strides() -> None:
    """One frame of eight whole, of the others every fourth token: what the budget of 44 of 128 tokens holds."""
    signals = random_clips((8, 4, 4), ratio=44 / 128, seed=1)
    relevance = slow_relevance(signals, 0)
    best = relevance.index(max(relevance))
    selection = make_method("videorouter", {"relevant": 1 / 8}).select(signals)
    counts = torch.bincount(signals.image[selection.keep], minlength=8).tolist()
    assert counts == [16 if frame == best else 4 for frame in range(8)]
    other = signals.images[(best + 1) % 8].tokens
    assert selection.keep[torch.isin(selection.keep, other)].tolist() == other[[0, 2, 8, 10]].tolist()


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_a_video_of_a_model(ratio: float) -> None:
    """By the stock model's own attention map of the layer before the cut."""
    _, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs = make_inputs("t5 v0 t9")
    module: Any = tiny_models.family("qwen2_5_vl")
    sizes = list(module.STEPS[0])
    attention = stock_attention("qwen2_5_vl", inputs)[3][0].mean(dim=0)
    columns = (inputs["input_ids"][0] == module.VIDEO).nonzero().flatten()
    question = torch.arange(int(columns[-1]) + 2, inputs["input_ids"].shape[1])  # behind the closing marker
    relevance = [float(part.mean()) for part in attention[question][:, columns].mean(dim=0).split(sizes)]
    mean = sum(relevance) / len(relevance)
    wanted = slow_counts(
        [n * (4 if value > mean else 1) for n, value in zip(sizes, relevance, strict=True)],
        sizes,
        budget(ratio, sum(sizes)),
    )
    kept = set(pruned_columns("videorouter", "qwen2_5_vl", inputs, ratio)[0])
    assert [len(kept & set(part.tolist())) for part in columns.split(sizes)] == wanted


def test_a_picture_and_the_global_policy_are_spread_evenly() -> None:
    signals = random_signals((4, 5), ratio=0.3)
    assert make_method("videorouter").select(signals).keep.tolist() == image_partition(signals.images[0])[1].tolist()
    signals = random_clips((5, 3, 4), ratio=0.5, seed=2)
    keep = make_method("videorouter", {"policy": "global"}).select(signals).keep
    assert torch.bincount(signals.image[keep]).tolist() == [6] * 5


def test_frames_with_equal_attention_are_alike() -> None:
    signals = random_clips((5, 3, 4), ratio=0.5)
    flat = torch.full((4, 5, len(signals.hidden)), 1 / len(signals.hidden))
    signals.attention = lambda rows, entering=False: flat[:, : len(rows)]
    keep = make_method("videorouter").select(signals).keep
    assert torch.bincount(signals.image[keep]).tolist() == [6] * 5


def test_the_layer() -> None:
    method = make_method("videorouter")
    assert [method.cuts(ModelFacts("llava", n), 0.3)[0].layer for n in (32, 4, 2)] == [4, 3, 1]
    assert method.cuts(ModelFacts("qwen3_vl", 36, first_cut=5), 0.3)[0].layer == 5


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"policy": "auto"}, "policy='auto' of method 'videorouter' must be one of 'fragment', 'global'"),
        ({"layer": 0}, "layer=0 has no layer before it"),
        ({"relevant": 1.5}, "relevant=1.5 must lie in 0..1"),
        ({"stride": 0.5}, "stride=0.5 be 1 or more"),
    ],
)
def test_values_that_no_run_can_mean_are_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_method("videorouter", parameters)
