"""Oracle: FastVID's Qwen2.5-VL code."""

from __future__ import annotations

from torch import Tensor

from tests.methods.oracle import Case, per_frame
from tests.methods.oracle.fastvid_llava_onevision import pruned, segment_sizes


def outputs(case: Case) -> dict[str, Tensor]:
    kept, features = pruned(case, "qwen2_5_vl")
    return {
        "segment_sizes": segment_sizes(case),
        "kept": kept,
        "kept_per_frame": per_frame(kept, case),
        "output_features": features,
    }
