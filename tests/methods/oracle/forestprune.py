"""Oracle: `prune_temporal_forest_spatial` of ForestPrune's LLaVA code."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods._at_input import places
from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods.forestprune import HALF, Method
from tests.methods.oracle import Case, answer, one_clip


def outputs(case: Case) -> dict[str, Tensor]:
    count, n, _ = case["frames"].shape
    # The released code rounds once, and what is rounded is the half.
    k = round(count * round(HALF * n) * float(case["keep_ratio"]) / HALF)
    signals = one_clip(case["frames"], k, case["grid"])
    method = Method(alike=float(case["tau"]), near=float(case["tau_spatial"]))
    kept = answer(method, signals).keep
    (clip,) = clips_of(signals)
    halves = method.halves(signals, clip)
    frames = zip(case["frames"], clip.frames, halves, strict=True)
    states, where = zip(*((states[half], places(image)[half]) for states, image, half in frames), strict=True)
    forest = method.forest(list(states), list(where), k)
    # Of tokens that tie at the cut any may stay.
    allowed = torch.isin(kept, torch.cat((case["must_keep"], case["may_keep"]))).all()
    return {
        "spatial_kept": torch.cat([half + start for half, start in zip(halves, clip.first, strict=True)]),
        "must_keep": case["must_keep"][torch.isin(case["must_keep"], kept)] if allowed else kept,
        "n_kept": torch.tensor(len(kept)),
        "depth": torch.tensor(forest.depth),
        "parent": torch.tensor(forest.parent),
    }
