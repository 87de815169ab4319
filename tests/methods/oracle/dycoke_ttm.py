"""Oracle: the first stage of DyCoke, before the language model."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.dycoke import Method
from tests.methods.oracle import Case, answer, one_clip, per_frame


def outputs(case: Case) -> dict[str, Tensor]:
    signals = one_clip(case["features"], 0)
    selection = answer(Method(merging=float(case["merging_ratio"])), signals)
    budgeted = answer(Method(), one_clip(case["features"], len(selection.keep)))
    assert budgeted.keep.tolist() == selection.keep.tolist()
    assert selection.merge is not None
    order = selection.merge.to_dense().argmax(dim=1)
    return {
        "kept": selection.keep,
        "kept_in_output_order": order,
        "kept_per_frame": per_frame(selection.keep, case),
    }
