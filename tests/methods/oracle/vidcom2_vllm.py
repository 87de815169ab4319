"""Oracle: VidCom2 as vLLM ships it."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods.vidcom2 import Method
from tests.methods.oracle import Case, answer, one_clip, per_frame


def outputs(case: Case) -> dict[str, Tensor]:
    features, ratio = case["features"], 1 - float(case["q"])
    method, signals = Method(counts="released"), one_clip(case["features"], 0, case["grid"], ratio=ratio)
    kept = answer(method, signals).keep
    exact = one_clip(features, len(kept), case["grid"], ratio=ratio)
    assert answer(Method(), exact).keep.tolist() == kept.tolist()
    (clip,) = clips_of(signals)
    return {
        "kept": kept,
        "n_kept": torch.tensor(len(kept)),
        "kept_per_frame": per_frame(kept, case),
        "per_frame_before_reconciliation": method.frame_counts(
            method.scores(features.flatten(0, 1), clip, ratio), clip
        ),
    }
