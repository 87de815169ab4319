"""Oracle: ``H2OKVCache_LayerWise``, where all but the recent tokens is visual."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.h2o import Method
from tests.methods.oracle import Case, answer, evicting


def outputs(case: Case) -> dict[str, Tensor]:
    return {"kept": answer(Method(), evicting(case)).keep}
