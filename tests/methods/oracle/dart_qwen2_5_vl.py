"""Oracle: DART's port to Qwen2.5-VL, `get_retained_image_token`."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.dart import Method
from tests.methods.oracle import Case, answer, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    start, n = int(case["image_start"]), int(case["image_length"])
    signals = one_image(
        n,
        case["n_kept"],
        start=start,
        behind=case["key_states"].shape[1] - start - n,
        key=case["key_states"],
        rotate=lambda states: states,
        normed=lambda: case["last_layer_state"],
    )
    method = Method(pivot_image=int(case["pivot_image"]), pivot_text=int(case["pivot_text"]))
    return {"kept": answer(method, signals).keep}
