"""Oracle: `prune_temporal_forest_spatial` of ForestPrune's LLaVA code, its frames as images of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Image, ImageSpan
from ivcp_eval.interface.ops import budget
from ivcp_eval.methods._at_input import places
from ivcp_eval.methods.forestprune import Method
from tests.methods.oracle import Case, answer, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    count, n, _ = case["frames"].shape
    ratio = float(case["keep_ratio"])
    signals = one_image(count * n, 1, hidden=case["frames"].flatten(0, 1))
    grid = (int(case["grid"][0]), int(case["grid"][1]))
    columns = torch.arange(count * n).split(n)
    signals.images = tuple(Image(part, budget(ratio, n), n, ImageSpan(part, grid=grid)) for part in columns)
    signals.cut = Cut(0, ratio)
    method = Method(frames=True, alike=float(case["tau"]), near=float(case["tau_spatial"]))
    kept = answer(method, signals).keep
    halves = method._halves(signals, list(signals.images))
    frames = zip(case["frames"], signals.images, halves, strict=True)
    states, where = zip(*((states[half], places(image)[half]) for states, image, half in frames), strict=True)
    forest = method.forest(list(states), list(where), len(kept))
    # Of tokens that tie at the cut any may stay.
    allowed = torch.isin(kept, torch.cat((case["must_keep"], case["may_keep"]))).all()
    return {
        "spatial_kept": torch.cat([part[half] for part, half in zip(columns, halves, strict=True)]),
        "must_keep": case["must_keep"][torch.isin(case["must_keep"], kept)] if allowed else kept,
        "n_kept": torch.tensor(len(kept)),
        "depth": torch.tensor(forest.depth),
        "parent": torch.tensor(forest.parent),
    }
