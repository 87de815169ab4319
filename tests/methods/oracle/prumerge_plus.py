"""Oracle: PruMerge+'s encoder, the released default."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.prumerge_plus import Method
from tests.methods.oracle import Case, prumerge


def outputs(case: Case) -> dict[str, Tensor]:
    return prumerge.outputs(case, Method(counts="outliers"))
