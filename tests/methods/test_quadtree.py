"""Oracle: a recursive quadtree of Python lists; the threshold is found by trying every value that a block has."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest
import torch

from ivcp_eval.interface import Image, Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_signals

Block = list[int]  # tokens


def unit(states: torch.Tensor) -> list[torch.Tensor]:
    return [state.double() / state.double().norm() for state in states]


def likeness(block: Block, states: list[torch.Tensor], kind: str) -> float:
    mean = torch.stack([states[t] for t in block]).sum(dim=0)
    cosines = [float(states[t] @ mean / mean.norm()) if mean.any() else 0.0 for t in block]
    return min(cosines) if kind == "least" else sum(cosines) / len(cosines)


def quarters(top: Fraction, left: Fraction, side: Fraction, rows: int, columns: int) -> list[tuple[Fraction, Fraction]]:
    return [(top + i * side / 2, left + j * side / 2) for i in (0, 1) for j in (0, 1)]


def tokens_in(top: Fraction, left: Fraction, side: Fraction, rows: int, columns: int) -> Block:
    """Lines from floor(a n) up to floor(b n) of a stretch [a, b) of an image of side 1."""
    lines = [range(int(a * n), int((a + side) * n)) for a, n in ((top, rows), (left, columns))]
    return [row * columns + column for row in lines[0] for column in lines[1]]


def slow_parts(
    states: list[torch.Tensor], rows: int, columns: int, kind: str, threshold: float, side: Fraction = Fraction(1),
    top: Fraction = Fraction(0), left: Fraction = Fraction(0),
) -> list[Block]:  # fmt: skip
    block = tokens_in(top, left, side, rows, columns)
    if len(block) < 2 or likeness(block, states, kind) >= threshold:
        return [block] if block else []
    return [
        part
        for y, x in quarters(top, left, side, rows, columns)
        for part in slow_parts(states, rows, columns, kind, threshold, side / 2, y, x)
    ]


def every_block(rows: int, columns: int) -> list[Block]:
    found, side = [], Fraction(1)
    while True:
        steps = int(1 / side)
        level = [tokens_in(i * side, j * side, side, rows, columns) for i in range(steps) for j in range(steps)]
        found += [block for block in level if len(block) > 1]
        if max(map(len, level)) == 1:
            return found
        side /= 2


def slow_choice(states: list[torch.Tensor], rows: int, columns: int, kind: str, budget: int) -> list[Block]:
    """The parts at the largest threshold that does not leave too many, and of the next block a few quarters alone."""
    levels = sorted({likeness(block, states, kind) for block in every_block(rows, columns)})
    parts = [list(range(rows * columns))]
    for level in [*levels, max(levels, default=0) + 1]:
        finer = slow_parts(states, rows, columns, kind, level, Fraction(1))
        if len(finer) > budget:
            # Blocks that this threshold divides and the last one does not, one after the other.
            while True:
                divided = next(
                    (block for block in every_block(rows, columns) if block in parts and block not in finer), None
                )
                if divided is None:
                    break
                inside = child_blocks(divided, rows, columns)
                missing = budget - len(parts)
                if len(inside) - 1 > missing:
                    alone = inside[:missing]
                    rest = [t for t in divided if all(t not in block for block in alone)]
                    return [block for block in parts if block != divided] + [rest, *alone]
                parts = [block for block in parts if block != divided] + inside
            raise AssertionError
        parts = finer
    return parts


def child_blocks(block: Block, rows: int, columns: int) -> list[Block]:
    side = Fraction(1)
    while True:
        steps = int(1 / side)
        for i in range(steps):
            for j in range(steps):
                if tokens_in(i * side, j * side, side, rows, columns) == block:
                    inner = [
                        tokens_in(y, x, side / 2, rows, columns)
                        for y, x in quarters(i * side, j * side, side, rows, columns)
                    ]
                    if block not in inner:
                        return [part for part in inner if part]
        side /= 2


def check(signals: Signals, image: Image, kind: str) -> None:
    states = signals.hidden[signals.visual[image.tokens]]
    assert image.span.grid is not None
    wanted = slow_choice(unit(states), *image.span.grid, kind, image.budget)
    kept, weights = make_method("quadtree", {"likeness": kind}).choose(signals, image)  # type: ignore[attr-defined]
    dense = weights.to_dense()
    got = [row.nonzero().flatten().tolist() for row in dense]
    assert sorted(got) == sorted(wanted)
    for place, block, row in zip(kept.tolist(), got, dense, strict=True):
        assert torch.allclose(row[block], torch.full((len(block),), 1 / len(block)))
        columns = image.span.grid[1]
        middle = [sum(x) / len(block) for x in zip(*(divmod(t, columns) for t in block), strict=True)]
        off = {t: sum((a - b) ** 2 for a, b in zip(divmod(t, columns), middle, strict=True)) for t in block}
        assert place in block
        assert off[place] == pytest.approx(min(off.values()))


@pytest.mark.parametrize("kind", ["least", "mean"])
@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (8, 3), (1, 9), (1, 1), (2, 1), (6, 6)])
def test_parts(grid: tuple[int, int], kind: str) -> None:
    n = grid[0] * grid[1]
    signals = random_signals(grid, ratio=1.0, seed=n)
    for budget in range(1, n + 1):
        check(signals, replace(signals.images[0], budget=budget), kind)


def test_ties() -> None:
    """Few directions, all at right angles: many blocks are equally alike."""
    for seed in range(4):
        signals = random_signals((4, 4), ratio=1.0)
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.eye(12)[torch.randint(2, (len(signals.hidden),), generator=generator)]
        method = make_method("quadtree")
        for budget in range(1, 17):
            image = replace(signals.images[0], budget=budget)
            kept, weights = method.choose(replace(signals, hidden=hidden), image)  # type: ignore[attr-defined]
            assert kept.unique().numel() == budget
            dense = weights.to_dense()
            assert torch.equal((dense > 0).sum(dim=0), torch.ones(16))
            assert torch.allclose(dense.sum(dim=1), torch.ones(budget))


def test_an_even_image_with_one_odd_corner() -> None:
    """The corner gets its own tokens, what is alike stays one."""
    signals = random_signals((8, 8), ratio=7 / 64)
    hidden = torch.zeros_like(signals.hidden)
    hidden[:, 0] = 1.0
    hidden[int(signals.visual[63])] = torch.eye(12)[1]
    selection = make_method("quadtree").select(replace(signals, hidden=hidden))
    assert selection.merge is not None
    sizes = sorted((selection.merge.to_dense() > 0).sum(dim=1).tolist())
    assert sizes == [4, 4, 4, 4, 16, 16, 16]
    selection = make_method("quadtree", {"threshold": 0.82}).select(replace(signals, hidden=hidden))
    assert selection.merge is not None
    assert not selection.exact
    sizes = sorted((selection.merge.to_dense() > 0).sum(dim=1).tolist())
    assert sizes == [1, 1, 1, 1, 4, 4, 4, 16, 16, 16]


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.82, 1.0])
@pytest.mark.parametrize("kind", ["least", "mean"])
def test_threshold(threshold: float, kind: str) -> None:
    signals = random_signals((5, 6), (1, 4), seed=3)
    method = make_method("quadtree", {"threshold": threshold, "likeness": kind})
    selection = method.select(signals)
    selection.check(signals, "quadtree")
    wanted = 0
    for image in signals.images:
        assert image.span.grid is not None
        states = unit(signals.hidden[signals.visual[image.tokens]])
        wanted += len(slow_parts(states, *image.span.grid, kind, threshold))
    assert selection.keep.numel() == wanted


def test_no_grid_is_a_row() -> None:
    signals = random_signals((4, 5), ratio=0.4)
    image = signals.images[0]
    line = replace(image, span=replace(image.span, grid=None))
    wide = replace(image, span=replace(image.span, grid=(1, 20)))
    kept = [make_method("quadtree").select(replace(signals, images=(one,))).keep for one in (line, wide)]
    assert torch.equal(*kept)
    assert kept[0].numel() == ceil(0.4 * 20)


def test_bad_parameters() -> None:
    for name, value in (("likeness", "most"), ("threshold", 1.5)):
        with pytest.raises(ValueError, match=name):
            make_method("quadtree", {name: value})
