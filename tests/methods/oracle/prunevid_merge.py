"""Oracle: PruneVid's merging before the language model."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods.prunevid import Method, frame_labels, windows_of
from tests.methods.oracle import Case, one_clip


def outputs(case: Case) -> dict[str, Tensor]:
    features = case["features"]
    states, n = features.flatten(0, 1), features.shape[1]
    (clip,) = clips_of(one_clip(features, 1))
    names = ("tau", "cluster_ratio", "temporal_segment_ratio")
    method = Method(counts="released", **{name: float(case[name]) for name in names})
    _, weights, counts = method.merged(states, clip)
    labels = frame_labels(states, torch.arange(len(states)).split(n), method.temporal_segment_ratio)
    lengths = [stop - start for start, stop in windows_of(labels)]
    static, dynamic = [], []
    for length in lengths:
        still, moving, counts = counts[0], counts[1 : 1 + length], counts[1 + length :]
        static.append(still)
        dynamic.append(sum(moving))
    return {
        "frame_labels_refined": torch.tensor(labels),
        "window_sizes": torch.tensor(lengths),
        "static_sizes": torch.tensor(static),
        "dynamic_sizes": torch.tensor(dynamic),
        "output_features": weights.to_dense() @ states,
    }
