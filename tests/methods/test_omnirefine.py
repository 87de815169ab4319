"""Oracle: every cover of a video by chunks, a recursive quadtree of lists, parts joined one after the other."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ivcp_eval.interface import Signals
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods.omnirefine import chunk_lengths, runs
from tests.methods.material import random_clips, random_signals
from tests.methods.test_merged_clips import of_own_clip, scene
from tests.methods.test_quadtree import child_blocks, every_block, likeness, unit


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm())) if a.any() and b.any() else 0.0


def covers(n: int, shortest: int, longest: int) -> list[list[int]]:
    """Every way to write n as a sum."""
    if not n:
        return [[]]
    return [[k, *rest] for k in range(shortest, min(longest, n) + 1) for rest in covers(n - k, shortest, longest)]


def slow_chunks(means: list[torch.Tensor], shortest: int, longest: int, cost: float) -> list[int]:
    n = len(means)
    if n <= shortest:
        return [n]
    unit_means = [m / m.norm() for m in means]

    @functools.cache
    def price(start: int, length: int) -> float:
        chunk = unit_means[start : start + length]
        return cost + sum(1 - cosine(m, torch.stack(chunk).sum(dim=0)) for m in chunk)

    found = []
    for lengths in covers(n, shortest, longest):
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        found.append((sum(map(price, starts, lengths)), lengths))
    return min(found)[1]


def slow_groups(
    states: list[list[torch.Tensor]], rows: int, columns: int, total: int | None, chunk_limits: tuple[int, int] = (3, 5)
) -> list[list[int]]:
    """Tokens, frame after frame, that one mean is of; ``total`` of them, or by the published thresholds."""
    size = rows * columns
    if total is not None:
        shortest = max(3, -(-len(states) // total))
        chunk_limits = shortest, max(5, 2 * shortest - 1)
    lengths = slow_chunks([torch.stack(frame).mean(dim=0) for frame in states], *chunk_limits, 0.02)
    chunks, start = [], 0
    for length in lengths:
        chunks.append(range(start, start + length))
        start += length

    def bound(chunk: range, block: list[int]) -> float:
        """The least likeness of a block, or of a block that it is part of, is what divides it: the largest of these."""
        outer = [other for other in every_block(rows, columns) if set(block) <= set(other)]
        return max(min(likeness(other, states[t], "least") for t in chunk) for other in outer)

    trees = [[list(range(size))] for _ in chunks]
    divisions = sorted(
        (bound(chunk, block), -len(block), number, place, block)
        for number, chunk in enumerate(chunks)
        for place, block in enumerate(every_block(rows, columns))
    )
    for value, _, number, _, block in divisions:
        inside = child_blocks(block, rows, columns)
        for alone in range(1, len(inside)):  # so many quarters on their own, and the rest
            in_frames = sum(len(tree) * len(chunk) for tree, chunk in zip(trees, chunks, strict=True))
            if total is None:
                goes_on = value < 0.82
            else:
                goes_on = sum(map(len, trees)) < total and (value < 0.82 or in_frames < total)
            if goes_on:
                rest = [place for place in block if all(place not in one for one in inside[:alone])]
                others = [one for one in trees[number] if not set(one) <= set(block)]
                trees[number] = [*others, *inside[:alone], rest]
    both = list(zip(trees, chunks, strict=True))
    groups = [[(t, tuple(sorted(block)))] for tree, chunk in both for t in chunk for block in tree]
    links = []
    for tree, chunk in both:
        for t in chunk[1:]:
            for block in tree:
                now, before = (torch.stack([states[f][i] for i in block]).mean(dim=0) for f in (t, t - 1))
                links.append((cosine(now, before), t, tuple(sorted(block))))
    if total is None:
        links = [link for link in links if link[0] >= 0.58]
    else:
        links = sorted(links, reverse=True)[: len(groups) - total]
    for _, t, joined in links:
        a, b = (next(g for g in groups if (f, joined) in g) for f in (t - 1, t))
        groups = [g for g in groups if g is not a and g is not b] + [a + b]
    return sorted(sorted(t * size + place for t, one in group for place in one) for group in groups)


def groups_of(signals: Signals, **parameters: Any) -> list[list[int]]:
    selection = make_method("omnirefine", parameters).select(signals)
    selection.check(signals, "omnirefine")
    assert selection.merge is not None
    dense = selection.merge.to_dense()
    assert of_own_clip(signals, selection)
    for token, row in zip(selection.keep.tolist(), dense, strict=True):
        assert row[token] > 0, "a mean stands at a token of its own"
        assert row[row > 0].unique().numel() == 1
    return sorted(row.nonzero().flatten().tolist() for row in dense)


def material(layout: tuple[int, int, int], ratio: float, noise: float | None, seed: int) -> Signals:
    signals = random_clips(layout, ratio=ratio, seed=seed)
    return signals if noise is None else scene(signals, noise, seed)


@pytest.mark.parametrize("layout", [(7, 3, 4), (3, 4, 4), (10, 2, 2), (1, 4, 5), (2, 1, 3)])
@pytest.mark.parametrize("noise", [None, 0.5, 0.1])
def test_groups(layout: tuple[int, int, int], noise: float | None) -> None:
    for seed, ratio in enumerate((0.1, 0.25, 0.5, 0.9)):
        signals = material(layout, ratio, noise, seed)
        frames = [unit(signals.hidden[signals.visual[image.tokens]]) for image in signals.images]
        total = budget(ratio, layout[0] * layout[1] * layout[2])
        assert groups_of(signals) == slow_groups(frames, *layout[1:], total)


@pytest.mark.parametrize("noise", [None, 0.5, 0.05])
def test_the_published_thresholds(noise: float | None) -> None:
    signals = material((7, 3, 4), 0.5, noise, 1)
    frames = [unit(signals.hidden[signals.visual[image.tokens]]) for image in signals.images]
    assert groups_of(signals, counts="released") == slow_groups(frames, 3, 4, None)


def test_a_picture_is_the_quadtrees() -> None:
    for ratio in (0.1, 0.25, 0.5, 0.9):
        signals = random_signals((5, 6), (3, 3), ratio=ratio)
        ours, theirs = (make_method(name).select(signals) for name in ("omnirefine", "quadtree"))
        assert torch.equal(ours.keep, theirs.keep)
        assert ours.merge is not None
        assert theirs.merge is not None
        assert torch.equal(ours.merge.to_dense(), theirs.merge.to_dense())


def test_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 12):
        means = torch.randn(n, 5, generator=generator)
        for limits in ((3, 5), (1, 4), (2, 3), (4, 7)):
            assert chunk_lengths(means, *limits, 0.02) == slow_chunks(list(means.double()), *limits, 0.02)
    shots = torch.eye(4)[[0] * 4 + [1] * 3 + [2] * 5]
    assert chunk_lengths(shots, 3, 5, 0.02) == [4, 3, 5]


def test_fewer_tokens_than_chunks() -> None:
    """Ten frames, two tokens: two chunks of five frames, of each one mean, in the middle of its third frame."""
    signals = random_clips((10, 1, 1), ratio=0.2)
    assert [len(group) for group in groups_of(signals)] == [5, 5]
    assert make_method("omnirefine").select(signals).keep.tolist() == [2, 7]


def test_runs() -> None:
    assert runs(torch.tensor([-1, -1, 0, 1, 2, 3]), torch.tensor([2, 4, 5])).tolist() == [0, 1, 0, 2, 0, 2]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"counts": "all"}, "counts='all' of method 'omnirefine' must be one of 'ratio', 'released'"),
        ({"likeness": "most"}, "likeness='most' of method 'omnirefine' must be one of 'least', 'mean'"),
        ({"spatial": 1.5}, "spatial=1.5 and temporal=0.58 must be cosines"),
        ({"longest": 4}, "longest=4 at least twice the shortest less 1"),
        ({"cost": -1.0}, "cost=-1.0 0 or more"),
    ],
)
def test_values_that_no_run_can_mean_are_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_method("omnirefine", parameters)
