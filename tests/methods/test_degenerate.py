"""Every registered method on states that rank nothing: budgets stay exact, and one broken token leaves alone.

A NaN comes from half precision that overflowed; equal states from a blank picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.interface import AbstractScorer, ModelFacts, Selection, Signals
from ivcp_eval.interface.registry import PLUS_IVC, make_method, method_names
from tests.engine import tiny_models
from tests.methods.material import random_clips, random_signals
from tests.methods.test_families import a_family_of

CHOOSING = [n for n in method_names() if any(c.ratio < 1 for c in make_method(n).cuts(ModelFacts("llava", 8), 0.5))]
CHOOSING.remove("framefusion")  # its last step alone holds the budget: test_framefusion.py
NAMES = [*CHOOSING, *(n + PLUS_IVC for n in CHOOSING if isinstance(make_method(n), AbstractScorer))]
CLIPS = [n for n in CHOOSING if any(c.budget == "clip" for c in make_method(n).cuts(ModelFacts("llava", 8), 0.5))]


def changed(signals: Signals, edit: Callable[[Tensor, Tensor], Tensor]) -> Signals:
    """``edit(states with tokens first, visual indices)`` on everything a method could rank by."""

    def on(states: Tensor | None, axis: int = -2) -> Tensor:
        assert states is not None
        return edit(states.clone().movedim(axis, 0), signals.visual).movedim(0, axis)

    every = torch.arange(signals.n_visual)
    attention, project, normed = signals.attention, signals.project, signals.normed
    assert project is not None
    assert normed is not None
    return replace(
        signals,
        hidden=on(signals.hidden),
        query=on(signals.query),
        key=on(signals.key),
        value=on(signals.value),
        attention=lambda rows, entering=False: on(attention(rows, entering=entering), -1),
        project=lambda signal: on(project(signal)),
        normed=lambda: on(normed()),
        vision={k: v if k == "group" else edit(v.clone(), every) for k, v in signals.vision.items()},
        memory={},
    )


def chosen(name: str, signals: Signals) -> Selection:
    """What the method keeps at its first real cut, checked."""
    method = make_method(name)
    cuts = method.cuts(ModelFacts("llava", 8), 0.5)
    look = [cut.ratio == 1 for cut in cuts]
    for _ in range(look.index(False)):
        whole = tuple(replace(image, budget=image.n_prompt) for image in signals.images)
        method.select(replace(signals, images=whole))
    first = look.index(False)
    assert signals.cut is not None
    cut = replace(cuts[first], ratio=signals.cut.ratio) if cuts[first].evicts else signals.cut
    signals = replace(signals, stage=first, cut=cut)
    if cut.late:
        method.observe(signals)
    selection = method.select(signals)
    selection.check(signals, name)
    return selection


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf, -torch.inf])
def test_nothing_to_rank_by(name: str, value: float) -> None:
    def edit(states: Tensor, visual: Tensor) -> Tensor:
        states[visual] = value
        return states

    for ratio in (0.05, 0.5, 1.0):
        signals = changed(random_signals((3, 5), (1, 1), ratio=ratio), edit)
        for keep in torch.atleast_2d(chosen(name, signals).keep):
            for image in signals.images:
                assert int(torch.isin(keep, image.tokens).sum()) == image.budget


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf, -torch.inf])
def test_nothing_to_rank_by_in_videos(name: str, value: float) -> None:
    def edit(states: Tensor, visual: Tensor) -> Tensor:
        states[visual] = value
        return states

    for ratio in (0.02, 0.3, 0.9):  # less than a frame, and more than whole frames can give up
        signals = changed(random_clips((7, 3, 5), (0, 1, 1), (2, 2, 2), (1, 1, 1), ratio=ratio), edit)
        keep = chosen(name, signals).keep
        for clip in signals.clips:
            assert sum(int(torch.isin(keep, image.tokens).sum()) for image in clip) == sum(i.budget for i in clip)


@pytest.mark.parametrize("name", method_names())
def test_a_broken_picture_spoils_its_own_row_only(name: str) -> None:
    model: Any
    model, make_inputs = tiny_models.build(a_family_of(name))
    alone, both = make_inputs("t4 i1 t3 i2 t6"), make_inputs("t4 i1 t3 i2 t6", "t5 i0 t9")
    both["pixel_values"][alone["pixel_values"].shape[0] :] = torch.nan
    logits = []
    for inputs in (alone, both):
        with ivcp_eval.prune(model, name, 0.5):
            out = model.generate(
                **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        logits.append(torch.stack(out.logits, dim=1))
    assert torch.allclose(logits[1][0], logits[0][0], atol=1e-4)
    assert bool(logits[1][1].isnan().any()), "the other row is broken, and not in silence"


@pytest.mark.parametrize("name", ["divprune", "fastv", "iwp", "pyramiddrop", "sparsevlm"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_broken_token_leaves_first(name: str, value: float) -> None:
    """Wherever it stands. (Elsewhere a softmax or a merge over all tokens has no place for it.)"""
    signals = random_signals((4, 6), ratio=0.5, seed=2)
    for token in range(24):

        def edit(states: Tensor, visual: Tensor, token: int = token) -> Tensor:
            states[visual[token]] = value
            return states

        assert token not in chosen(name, changed(signals, edit)).keep.tolist()
