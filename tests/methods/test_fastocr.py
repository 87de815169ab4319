"""Oracle: focal layers and fixations with Python loops over random queries and keys."""

from __future__ import annotations

from typing import Any

import pytest

import ivcp_eval
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import best, random_steps, slow_attention


def slow(focal: set[int], n_layers: int, n_steps: int, n: int, k: int) -> list[list[int] | None]:
    """What each layer of each step attends to; None for everything."""
    wanted: list[list[int] | None] = []
    fixation: list[int] | None = None
    scores = [0.0] * n
    for step in random_steps(n_layers, n_steps, n, 0.0, {}):
        if step.layer == 0:
            scores = [0.0] * n
        if step.layer - 1 in focal:
            for head in slow_attention(step, list(range(n))):
                scores = [score + weight / 4 for score, weight in zip(scores, head, strict=True)]
            fixation = best(scores, k)
        wanted.append(None if step.layer in focal else fixation)
    return wanted


@pytest.mark.parametrize("shares", [(0.25, 0.5, 0.75), (0.0,), (0.5, 0.625)])
def test_formula(shares: tuple[float, ...]) -> None:
    method, memory = make_method("fastocr", {"focal": shares}), dict[str, Any]()
    got = [method.attended(step) for step in random_steps(8, 3, 30, 0.2, memory)]
    wanted = slow({int(8 * share) for share in shares}, 8, 3, 30, 6)
    assert [None if mask is None else mask.nonzero().flatten().tolist() for mask in got] == wanted
    assert len({str(fixation) for fixation in wanted}) > 3


def test_what_was_attended_to_is_measured() -> None:
    """Six layers with focal ones at 1, 3 and 4; nothing leaves the cache."""
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with ivcp_eval.prune(model, "fastocr", 0.25) as run:
        model.generate(**make_inputs("t5 i0 t9", "t12"), max_new_tokens=3, do_sample=False)
    n, text_only = run.visual_prompt
    few = round(0.25 * n)
    assert run.visual_attended == [[n + n + 1 * few + n + n + few, few + n + few + n + n + few], []]
    assert run.analytic_share(0, 1) == pytest.approx((4 * n + 2 * few) / (6 * n))
    assert run.analytic_share(0, 2) == pytest.approx((7 * n + 5 * few) / (12 * n))
    assert run.analytic_share(1, 2) is None
    assert run.cache_ratio == run.kept_ratio == 1
    assert text_only == 0


@pytest.mark.parametrize("focal", [(), (0.5, 0.25), (1.0,)])
def test_focal_layers_that_are_none(focal: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="focal="):
        make_method("fastocr", {"focal": focal})
