"""Oracle: AOT's stage inside one frame, on SigLIP."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.aot import Method
from tests.methods.oracle import Case, answer, merged, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    names = {"early/received": "shallow_attention", "received": "deep_attention"}
    vision = {name: case[key].mean(dim=0) for name, key in names.items()}
    states = case["projected_features"]
    signals = one_image(len(states), case["visual_token_num"], hidden=states, vision=vision, grid=(27, 27))
    selection = answer(Method(), signals)
    return {"kept": selection.keep, "merged_features": merged(selection, states)}
