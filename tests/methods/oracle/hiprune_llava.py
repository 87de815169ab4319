"""Oracle: HiPrune's LLaVA code, from queries and keys of two blocks of CLIP."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.engine.signals.vision import patch_signals
from ivcp_eval.interface import PatchStates
from ivcp_eval.methods.hiprune import Method
from tests.methods.oracle import Case, answer, one_image

CLASS_TOKEN, SIDE = 1, 24


def outputs(case: Case) -> dict[str, Tensor]:
    received = {}
    for name in ("shallow", "deep"):
        query, key = case[f"{name}_query"], case[f"{name}_key"]
        states = PatchStates(query, key, (query.shape[1],), query.shape[2] ** -0.5, class_token=True)
        received[name] = patch_signals(states, Method.tower_signals)["received"][CLASS_TOKEN:]
    vision = {"middle/received": received["shallow"], "received": received["deep"]}
    signals = one_image(SIDE * SIDE, case["retention"], vision=vision, grid=(SIDE, SIDE))
    n_queries = case["shallow_query"].shape[1]
    return {
        "kept": answer(Method(alpha=float(case["alpha"])), signals).keep,
        "shallow_received": received["shallow"] / n_queries,
        "deep_received": received["deep"] / n_queries,
    }
