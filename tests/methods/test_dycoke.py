"""Oracle: what frames are compared with, by hand; steps with Python loops; recorded answers are in oracle/."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import ivcp_eval
from ivcp_eval.interface import Cut
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods.dycoke import LEAVES, WHOLE, Method, compared_with
from tests.engine import tiny_models
from tests.methods.material import best, random_clips, random_signals, random_steps, slow_attention


@pytest.mark.parametrize(
    ("count", "other"),
    [
        (1, [WHOLE]),
        (3, [WHOLE, 0, WHOLE]),
        (4, [WHOLE, 0, WHOLE, 2]),
        (5, [WHOLE, 0, 0, 2, LEAVES]),
        (8, [WHOLE, 0, 0, 2, WHOLE, 4, WHOLE, 6]),
    ],
)
def test_frames(count: int, other: list[int]) -> None:
    assert compared_with(count) == other


def test_frames_between_share_what_whole_frames_leave() -> None:
    signals = random_clips((8, 2, 5), ratio=0.6)  # 48 of 80: three whole frames, and 18 of the other five
    keep = make_method("dycoke").select(signals).keep
    counts = torch.bincount(signals.image[keep], minlength=8).tolist()
    assert counts == [10, 4, 4, 4, 10, 3, 10, 3]


def test_whole_frames_that_are_too_many_are_thinned_evenly() -> None:
    signals = random_clips((8, 2, 5), ratio=0.2)  # 16 of 80
    keep = make_method("dycoke").select(signals).keep
    assert torch.bincount(signals.image[keep], minlength=8).tolist() == [6, 0, 0, 0, 5, 0, 5, 0]
    picture = random_signals((4, 6), ratio=0.25)
    uniform = make_method("uniform").select(picture).keep
    assert torch.equal(make_method("dycoke").select(picture).keep, uniform)


def test_the_order_inside_a_frame_is_the_released_one_where_survivors_are_numbered_anew() -> None:
    signals = random_clips((2, 3, 4), ratio=0.75, seed=3)
    kept = make_method("dycoke").select(signals)
    assert kept.merge is None, "positions stay"
    anew = make_method("dycoke").select(replace(signals, cut=Cut(0, 0.75, renumber=True, budget="clip")))
    assert torch.equal(anew.keep, kept.keep)
    assert anew.merge is not None
    order = anew.merge.to_dense().argmax(dim=1)
    assert order.sort().values.tolist() == kept.keep.tolist()
    states = torch.nn.functional.normalize(signals.hidden[signals.visual], dim=1)
    like = (states[order[12:]] * states[order[12:] - 12]).sum(dim=1)
    assert like.tolist() == sorted(like.tolist())


@pytest.mark.parametrize("alike", [0.9, 0.5])
def test_steps(alike: float) -> None:
    method, memory, n = make_method("dycoke", {"hide": 0.6, "layer": 2, "alike": alike}), dict[str, Any](), 30
    got, wanted = [], list[list[int] | None]()
    before: list[float] | None = None
    seen: list[int] | None = None
    for step in random_steps(4, 5, n, 0.5, memory):
        mask = method.attended(step)
        got.append(None if mask is None else mask.nonzero().flatten().tolist())
        if step.layer == 2:
            heads = slow_attention(step, list(range(n)), beside_text=True)
            now = [sum(head[token] for head in heads) / 4 for token in range(n - 1)]
            cosine = -1.0
            if before is not None:
                cosine = sum(a * b for a, b in zip(now, before, strict=True)) / math.hypot(*now) / math.hypot(*before)
            seen = None if cosine >= alike else [*best(now, int(29 * 0.4)), n - 1]
            before = now
        wanted.append(seen if step.layer >= 2 else None)
    assert got == wanted
    assert len({str(mask) for mask in wanted}) > 2


def test_what_steps_saw_is_measured() -> None:
    model: Any
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with ivcp_eval.prune(model, "dycoke", 0.5, hide=0.5, alike=1.0) as run:
        model.generate(**make_inputs("t5 i0 t9"), max_new_tokens=3, do_sample=False)
    (n,) = run.visual_kept
    few = int((n - 1) * 0.5) + 1
    assert run.visual_attended == [[3 * n + 3 * few] * 2]  # of six layers those from the fourth on
    with ivcp_eval.prune(model, "dycoke", 0.5, hide=0) as run:
        model.generate(**make_inputs("t5 i0 t9"), max_new_tokens=3, do_sample=False, num_beams=2)
    assert not any(run.visual_attended)


@pytest.mark.parametrize("parameters", [{"merging": 1.5}, {"hide": -0.1}, {"layer": 0}, {"alike": 2.0}])
def test_refused_parameters(parameters: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        Method(**parameters)  # type: ignore[arg-type]
