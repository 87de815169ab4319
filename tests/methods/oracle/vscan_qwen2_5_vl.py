"""Oracle: VScan's first stage on Qwen2.5-VL."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.vscan import Method
from tests.methods.oracle import Case, answer, merged, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    vision = {"early/received": case["local_attention"], "received": case["global_attention"]}
    states = case["image_embeds"]
    signals = one_image(len(states), len(case["kept"]), hidden=states, vision=vision, grid=case["grid"].tolist())
    selection = answer(Method(), signals)
    return {"kept": selection.keep, "merged_features": merged(selection, states)}
