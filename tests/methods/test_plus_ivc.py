"""Oracle: the coordinate set and the budget with Python loops."""

from __future__ import annotations

import pytest
import torch

import ivcp_eval
from ivcp_eval.interface import AbstractScorer
from ivcp_eval.registry import make_method, method_name, method_names
from tests import tiny_models
from tests.methods.material import best, random_signals


def test_forced_set_and_budget() -> None:
    signals = random_signals((5, 8), (3, 4), ratio=0.5)
    rows = signals.attention([-1])[:, 0]
    scores = [float(rows[:, v].mean()) for v in signals.visual.tolist()]
    cos, sin = ([float(part[0, v].mean()) for v in signals.visual.tolist()] for part in signals.rope())
    wanted = []
    for start, n, budget in ((0, 40, 20), (40, 12, 6)):
        each = min(round(0.1 * n), round(0.2 * budget))
        forced = set(best(cos[start : start + n], each)) | set(best(sin[start : start + n], each))
        order = sorted((i for i in range(n) if i not in forced), key=lambda i: (-scores[start + i], i))
        wanted += sorted(start + i for i in [*forced, *order[: budget - len(forced)]])
    got = make_method("fastv+ivc").select(signals).keep.tolist()
    assert got == wanted
    assert got != make_method("fastv").select(signals).keep.tolist()
    assert (
        make_method("fastv+ivc", {"ivc": 0.0}).select(signals).keep.tolist()
        == make_method("fastv").select(signals).keep.tolist()
    )


def test_names_and_parameters() -> None:
    method = make_method("fastv+ivc", {"layer": 3, "ivc_share": 0.1})
    assert method_name(method) == "fastv+ivc"
    assert (method.inner.layer, method.ivc_share) == (3, 0.1)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'layers'; did you mean 'layer'"):
        make_method("fastv+ivc", {"layers": 3})
    with pytest.raises(ValueError, match="returns sets, not scores"):
        make_method("divprune+ivc")
    for name in ("fastv+ivc+ivc", "fastv+ive", "+ivc"):
        with pytest.raises(ValueError, match="unknown method"):
            make_method(name)


@pytest.mark.parametrize("name", [n for n in method_names() if isinstance(make_method(n), AbstractScorer)])
def test_every_scorer_runs_with_it(name: str) -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with ivcp_eval.prune(model, f"{name}+ivc", 0.25) as run, torch.no_grad():
        model(**make_inputs("t5 i0 t9", "t4 i1 t3 i2 t6", "t12"))
    assert run.method == f"{name}+ivc"
    assert run.visual_kept == [6, 5, 0]
