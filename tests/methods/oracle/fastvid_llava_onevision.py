"""Oracle: FastVID's LLaVA-OneVision code."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods.fastvid import Method, Preset, split
from tests.methods.oracle import Case, one_clip, per_frame


def pruned(case: Case, preset: Preset) -> tuple[Tensor, Tensor]:
    """What the method keeps, and what it becomes, with the authors' features and attention of the frames."""
    names = ("c", "tau", "d", "p", "beta", "ignore")
    method = Method(preset=preset, counts="released", **{name: case[name].item() for name in names if name in case})
    (clip,) = clips_of(one_clip(case["features"], 1))
    states, attention = case["features"].flatten(0, 1), case["frame_attention"].flatten()
    ratio = float(case["retention_ratio"])
    kept, weights = method.pruned(states, attention, case["frame_global_features"], clip, ratio, preset)
    return kept, weights.to_dense() @ states


def segment_sizes(case: Case) -> Tensor:
    """Frames of each segment."""
    unit = torch.nn.functional.normalize(case["frame_global_features"], dim=1)
    segments = split((unit[1:] * unit[:-1]).sum(dim=1), int(case["c"]), float(case["tau"]))
    return torch.tensor([stop - start for start, stop in segments])


def outputs(case: Case) -> dict[str, Tensor]:
    kept, features = pruned(case, "llava_onevision")
    salient = kept[torch.isin(kept, case["salient"])]
    return {
        "segment_sizes": segment_sizes(case),
        "salient": salient,
        "context_per_frame": per_frame(kept[~torch.isin(kept, salient)], case),
        "kept": kept,
        "output_features": features,
    }
