"""Oracle: PruneVid's choice inside the language model."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods.prunevid import Method
from tests.methods.oracle import Case


def outputs(case: Case) -> dict[str, Tensor]:
    sizes: list[int] = []
    names = ("static_sizes", "dynamic_sizes", "window_sizes")
    for still, moving, frames in zip(*(case[name].tolist() for name in names), strict=True):
        sizes += [still, *[moving // frames] * frames]
    part = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    method = Method(counts="released", alpha=float(case["alpha"]))
    return {"kept": method.of_parts(case["attention"].amax(dim=(0, 1)), part, 0)}
