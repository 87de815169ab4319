"""Oracle: SCOPE's function of that name."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods._greedy import coverage
from ivcp_eval.methods.scope import Method
from tests.methods.oracle import Case, answer, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    attention, alpha = case["cls_attention_sum"], float(case["alpha"])
    signals = one_image(len(attention), case["num_tokens"], vision={"cls": attention / 16, "feature": case["features"]})
    return {
        "kept": answer(Method(alpha=alpha), signals).keep,
        "selection_order": coverage(case["features"], attention**alpha, int(case["num_tokens"])),
    }
