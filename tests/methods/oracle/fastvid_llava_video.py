"""Oracle: FastVID's LLaVA-Video code, whose indices count the newline behind each row of 13 tokens."""

from __future__ import annotations

from torch import Tensor

from tests.methods.oracle import Case
from tests.methods.oracle.fastvid_llava_onevision import pruned, segment_sizes


def outputs(case: Case) -> dict[str, Tensor]:
    kept, features = pruned(case, "llava_video")
    return {
        "segment_sizes": segment_sizes(case),
        "kept_grid_index": kept // 13 * 14 + kept % 13,
        "newline_index": (kept // 13).unique() * 14 + 13,
        "output_features": features,
    }
