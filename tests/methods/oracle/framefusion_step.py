"""Oracle: one layer of FrameFusion."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.interface.ops import top
from ivcp_eval.methods.framefusion import Method, Progress, to_remove
from tests.methods.oracle import Case


def outputs(case: Case) -> dict[str, Tensor]:
    bounds = {name: float(case[name]) for name in ("similarity_lower_bound", "ratio_lower_bound")}
    method = Method(counts="released", **bounds)
    states, start = case["hidden_states"], int(case["image_start"])
    shares, cost = tuple(case["sparsity_before"].tolist()), float(case["cost"])
    n = int(case["image_length"]) - (int(case["original_length"]) - len(states))
    visual, share = states[start : start + n], to_remove(shares, cost)
    if bool(case["merging_was_finished"]):
        attention = case["last_query_attention"].mean(dim=0)[start : start + n]
        kept = top(attention, round(n * (1 - share)))
        made, after = visual[kept], Progress(shares, True, True)
    else:
        place = case["patch_type"][start : start + n]
        (kept, weights), after = method.merged(visual, place, share, int(share * n), Progress(shares))
        made = weights.to_dense() @ visual
    return {
        "kept_rows": torch.cat((torch.arange(start), kept + start, torch.arange(start + n, len(states)))),
        "output_hidden_states": torch.cat((states[:start], made, states[start + n :])),
        "sparsity_after": torch.tensor(after.merged),
        "finish_merging": torch.tensor(after.all_merged),
        "finish_pruning": torch.tensor(after.pruned),
    }
