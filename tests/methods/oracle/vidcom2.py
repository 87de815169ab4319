"""Oracle: the authors' VidCom2, on Qwen's grids and LLaVA-OneVision's."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods._clips import clips_of
from ivcp_eval.methods.vidcom2 import Method
from tests.methods.oracle import Case, answer, one_clip, per_frame


def outputs(case: Case) -> dict[str, Tensor]:
    features, ratio = case["features"], float(case["base_scale"])
    signals = one_clip(features, 0, case.get("grid", ()), ratio=ratio)
    method = Method(counts="shares")
    kept = answer(method, signals).keep
    (clip,) = clips_of(signals)
    scores = method.scores(features.flatten(0, 1), clip, ratio)
    return {
        "video_score": scores.video.view(features.shape[:2]),
        "frame_score": scores.frame.view(features.shape[:2]),
        "scales": scores.scales,
        "kept": kept,
        "kept_per_frame": per_frame(kept, case),
    }
