"""One file per recorded function: from the arrays of a case to what the method here answers to them.

``outputs(case)`` gives arrays by the names under which the authors' answers lie in the case; `test_oracles` compares.
What the arrays are: data/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ivcp_eval.engine.signals.source import attention_rows
from ivcp_eval.interface import AbstractMethod, Cut, Image, ImageSpan, Selection, Signals

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
