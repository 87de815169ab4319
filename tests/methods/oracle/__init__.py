"""One file per recorded function: from the arrays of a case to what the method here answers to them.

``outputs(case)`` gives arrays by the names under which the authors' answers lie in the case; `test_oracles` compares.
What the arrays are: data/README.md, and video/README.md of those of videos.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ivcp_eval.engine.signals.source import attention_rows
from ivcp_eval.interface import AbstractMethod, Cut, Frame, Image, ImageSpan, Selection, Signals
from ivcp_eval.interface.ops import apportion

Case = Mapping[str, Tensor]


def one_image(
    n: int, budget: Tensor | int, *, hidden: Tensor | None = None, start: int = 0, behind: int = 0, **parts: Any
) -> Signals:
    """A row with an image of ``n`` tokens from column ``start``, ``behind`` text tokens behind it.

    Args:
        hidden: (n, E) states of the image, zeros elsewhere. parts: fields of `Signals`, and ``grid`` of the image.
    """
    grid = tuple(int(side) for side in parts.pop("grid", ())) or None
    columns = torch.arange(start, start + n)
    text = torch.cat((torch.arange(start), torch.arange(start + n, start + n + behind)))
    states = torch.zeros(start + n + behind, 1 if hidden is None else hidden.shape[1])
    if hidden is not None:
        states[columns] = hidden
    return Signals(
        images=(Image(torch.arange(n), int(budget), n, ImageSpan(columns, grid=grid)),),  # type: ignore[arg-type]
        visual=columns,
        text=text,
        question=text[start:],
        hidden=states,
        rope=lambda: (states, states),
        attention=lambda rows, entering=False: states,
        cut=Cut(0, 0.5, renumber=True),
        **parts,
    )


def one_clip(
    features: Tensor, budget: Tensor | int, grid: Tensor | tuple[int, ...] = (), *, ratio: float = 0.5, **parts: Any
) -> Signals:
    """A row that is a video of T frames and nothing else, ``budget`` tokens of which may stay.

    Args:
        features: (T, N, E) states. grid: (rows, columns) of a frame. ratio: of the cut. parts: fields of `Signals`.
    """
    count, n, _ = features.shape
    signals = one_image(count * n, 0, hidden=features.flatten(0, 1), **parts)
    budgets = apportion(int(budget), [n] * count, [n] * count)
    sides = (int(grid[0]), int(grid[1])) if len(grid) else None
    tokens = torch.arange(count * n).split(n)
    spans = [ImageSpan(part, sides, frame=Frame(0, index)) for index, part in enumerate(tokens)]
    images = tuple(Image(*one) for one in zip(tokens, budgets, [n] * count, spans, strict=True))
    return replace(signals, images=images, cut=Cut(0, ratio, renumber=True, budget="clip"))


def per_frame(kept: Tensor, case: Case) -> Tensor:
    """(T,) how many of ``kept`` (K,), counted through the video, each frame of ``features`` (T, N, E) has."""
    count, n, _ = case["features"].shape
    return torch.bincount(kept // n, minlength=count)


def evicting(case: Case) -> Signals:
    """A row of ``n_visual`` tokens and the question, at an eviction that keeps ``budget`` in every head."""
    n, total = int(case["n_visual"]), case["key"].shape[1]
    query, key = case["query"], case["key"]
    signals = one_image(n, case["budget"], behind=total - n, query=query, key=key)
    return replace(
        signals,
        cut=Cut(0, 0.5, cache="own"),
        attention=lambda rows, entering=False: attention_rows(query, key, rows, key.shape[-1] ** -0.5),
    )


def answer(method: AbstractMethod, signals: Signals) -> Selection:
    """The method's selection, checked."""
    selection = method.select(signals)
    selection.check(signals, type(method).__module__)
    return selection


def merged(selection: Selection, states: Tensor) -> Tensor:
    """(K, E) what the survivors become."""
    assert selection.merge is not None
    return selection.merge.to_dense() @ states
