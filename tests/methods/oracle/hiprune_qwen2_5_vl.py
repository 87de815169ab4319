"""Oracle: HiPrune's Qwen2.5-VL code."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.hiprune import Method
from tests.methods.oracle import Case, answer, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    vision = {"middle/received": case["shallow_attention"], "received": case["deep_attention"]}
    signals = one_image(len(case["deep_attention"]), case["n_kept"], vision=vision, grid=case["grid"].tolist())
    return {"kept": answer(Method(alpha=float(case["alpha"])), signals).keep}
