"""Oracle: HoliTom's stage before the language model."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods.holitom import Method, best_windows, stands_still
from tests.methods.oracle import Case, one_clip


def outputs(case: Case) -> dict[str, Tensor]:
    features = case["features"]
    count, n, _ = features.shape
    states, frames = features.flatten(0, 1), torch.arange(count * n).split(n)
    ratio, tau = float(case["retain_ratio"]), float(case["tau"])
    numbers = {"neighbours": int(case["K"]), "longest": int(case["max_window"]), "beta": float(case["beta"])}
    windows, saved = best_windows(stands_still(states, frames, tau), numbers["longest"])
    (clip,) = clips_of(one_clip(features, 1))
    method = Method(counts="released", tau=tau, plain_mean=bool(case["no_beta"]), **numbers)
    kept, weights = method.outer(states, case["attention"].flatten(), clip, ratio)
    return {
        "windows": torch.tensor(windows) - torch.tensor([0, 1]),
        "total_reduced": torch.tensor(saved, dtype=torch.float64),
        "output_frame": kept // n,
        "output_position": kept % n,
        "output_features": weights.to_dense() @ states,
    }
