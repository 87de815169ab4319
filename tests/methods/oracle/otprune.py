"""Oracle: OTPrune's `OTPrune` and `greedy_select`."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.otprune import Method
from tests.methods.oracle import Case, answer, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    n = len(case["embeddings"])
    signals = one_image(n, round(float(case["ratio"]) * n), hidden=case["embeddings"])
    method = Method(gamma=float(case["gamma"]))
    return {"kept": answer(method, signals).keep, "selection_order": method.choose(signals, signals.images[0])}
