"""Oracle: VScan's first stage on LLaVA."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.vscan import Method
from tests.methods.oracle import Case, answer, merged, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    vision = {"early/cls": case["shallow_cls_attention"].mean(dim=0), "cls": case["deep_cls_attention"].mean(dim=0)}
    states = case["projected_features"]
    signals = one_image(len(states), case["n_kept"], hidden=states, vision=vision, grid=(24, 24))
    selection = answer(Method(), signals)
    return {"kept": selection.keep, "merged_features": merged(selection, states)}
