"""Oracle: `gprune` of ForestPrune's LLaVA code."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.gprune import Method
from tests.methods.oracle import Case, answer, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    method = Method(
        threshold=float(case["threshold"]), temperature=float(case["temperature"]), steps=int(case["iterations"])
    )
    n, keep = len(case["features"]), int(case["keep"])
    signals = one_image(n, keep if keep > 0 else round(n / 2), hidden=case["features"])
    return {"kept": answer(method, signals).keep, "scores": method.scores(case["features"])}
