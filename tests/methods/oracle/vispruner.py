"""Oracle: VisPruner's `encode_images`."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.vispruner import Method
from tests.methods.oracle import Case, answer, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    vision = {"cls": case["cls_attention"].mean(dim=0), "feature": case["features"]}
    signals = one_image(len(case["features"]), case["visual_token_num"], vision=vision)
    return {"kept": answer(Method(important=float(case["important_ratio"])), signals).keep}
