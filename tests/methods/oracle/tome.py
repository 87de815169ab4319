"""Oracle: ToMe's `bipartite_soft_matching` and `merge_wavg`, with the order of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods.tome import folded
from tests.methods.oracle import Case


def outputs(case: Case) -> dict[str, Tensor]:
    unit = torch.nn.functional.normalize(case["metric"], dim=1)
    place = folded(unit, int(case["r"]), bool(case["class_token"]))
    source = torch.zeros_like(case["source"])
    source[place, torch.arange(len(place))] = True
    weights = source.float()
    size = weights @ case["size"]
    return {"source": source, "merged": weights @ (case["x"] * case["size"]) / size, "merged_size": size}
