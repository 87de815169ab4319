"""Oracle: ToMe's `bipartite_soft_matching` and `merge_wavg`, up to the order of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods.tome_post import matched
from tests.methods.oracle import Case


def outputs(case: Case) -> dict[str, Tensor]:
    into = matched(case["metric"], int(case["r"]), bool(case["class_token"]))
    groups = [(into == token).nonzero().flatten() for token in range(len(into)) if into[token] == token]
    wanted = case["source"].nonzero()
    first = {int(row.nonzero()[0]): number for number, row in enumerate(case["source"])}
    order = sorted(range(len(groups)), key=lambda g: first[int(groups[g][0])])
    assert len(wanted) == len(into)
    source = torch.zeros_like(case["source"])
    merged, size = torch.zeros_like(case["merged"]), torch.zeros_like(case["merged_size"])
    for row, number in enumerate(order):
        group = groups[number]
        source[row, group] = True
        size[row] = case["size"][group].sum()
        merged[row] = (case["x"][group] * case["size"][group]).sum(dim=0) / size[row]
    return {"source": source, "merged": merged, "merged_size": size}
