"""Which method runs on which family: all pairs but the ones named here, with the reason that is shown."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

import ivcp_eval
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.registry import method_names
from tests.engine import tiny_models

UNSUPPORTED = {
    ("downsample", "llava"): "every image costs the same number of visual tokens",
    **{
        (method, "deepseek_vl2"): "its cache holds compressed latents that all heads share, not keys"
        for method in ("dycoke", "fastocr", "h2o", "lookm", "pyramidkv", "rotatek", "snapkv", "think", "vlcache")
    },
    **{
        (method, family): "its vision tower has no class token"
        for method in ("prumerge", "prumerge_plus")
        for family in tiny_models.names()
        if family.startswith("qwen") or family in ("deepseek_vl2", "llava_onevision")
    },
    **{
        ("eventprune", family): "a token is no rectangle of them"
        for family in ("deepseek_vl2", "llava", "llava_next", "llava_onevision", "qwen2_5_vl_points")
    },
    **{("tome", family): "a visual token is not one patch" for family in tiny_models.names() if family != "llava"},
}


def a_family_of(method: str) -> str:
    """Qwen2.5-VL where the method runs on it, else LLaVA."""
    return "llava" if (method, "qwen2_5_vl") in UNSUPPORTED else "qwen2_5_vl"


@pytest.mark.parametrize("family", tiny_models.names())
@pytest.mark.parametrize("method", method_names())
def test_runs_or_says_why(method: str, family: str) -> None:
    model, _ = tiny_models.build(family)
    reason = UNSUPPORTED.get((method, family))
    if reason is None:
        with ivcp_eval.prune(model, method, 0.5) as run:
            assert run.method == method
        return
    with pytest.raises(Unsupported, match=re.escape(reason)), ivcp_eval.prune(model, method, 0.5):
        pass


@pytest.mark.parametrize("method", method_names())
def test_runs_while_gradients_are_on(method: str) -> None:
    """A bare forward in a notebook."""
    model: Any
    frozen, make_inputs = tiny_models.build(a_family_of(method))
    model = copy.deepcopy(frozen).requires_grad_(True)
    with ivcp_eval.prune(model, method, 0.5):
        assert model(**make_inputs("t5 i0 t9")).logits.requires_grad
