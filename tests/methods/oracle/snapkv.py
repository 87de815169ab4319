"""Oracle: ``SnapKVCluster.update_kv``, where all but the window is visual."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.snapkv import Method
from tests.methods.oracle import Case, answer, evicting


def outputs(case: Case) -> dict[str, Tensor]:
    return {"kept": answer(Method(window=int(case["window"]), kernel=int(case["kernel"])), evicting(case)).keep}
