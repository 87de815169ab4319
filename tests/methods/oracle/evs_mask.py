"""Oracle: vLLM's `compute_retention_mask`, its count of tokens included."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods.evs import Method
from tests.methods.oracle import Case, answer, one_clip, per_frame


def outputs(case: Case) -> dict[str, Tensor]:
    ratio = 1 - float(case["q"])
    signals = one_clip(case["features"], 0, case["grid"], ratio=ratio)
    kept = answer(Method(counts="released"), signals).keep
    exact = one_clip(case["features"], len(kept), case["grid"], ratio=ratio)
    assert answer(Method(), exact).keep.tolist() == kept.tolist()
    return {"kept": kept, "n_kept": torch.tensor(len(kept)), "kept_per_frame": per_frame(kept, case)}
