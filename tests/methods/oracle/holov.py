"""Oracle: HoloV's function of both repositories' files, order and zero vectors included."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.holov import Method
from tests.methods.oracle import Case, answer, merged, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    vision = {"received": case["attention"]}
    signals = one_image(len(case["features"]), case["visual_token_num"], hidden=case["features"], vision=vision)
    selection = answer(Method(stretches=int(case["num_patches"])), signals)
    assert selection.merge is not None
    column = selection.merge.to_dense()
    positions = column.argmax(dim=1).masked_fill(column.sum(dim=1) == 0, -1)
    return {
        "positions_in_output_order": positions,
        "kept": positions[positions >= 0].sort().values,
        "output_features": merged(selection, case["features"]),
    }
