"""Oracle: ``PyramidKVCluster.update_kv``, where all but the window is visual; rounded steps leave later layers more."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.pyramidkv import Method
from tests.methods.oracle import Case, answer, evicting


def outputs(case: Case) -> dict[str, Tensor]:
    method = Method(window=int(case["window"]), kernel=1)
    n, n_layers = int(case["n_visual"]), int(case["n_layers"])
    layer = int(case["layer"])
    share = method.shares(n_layers, float(case["mean_budget"]) / n)[layer]
    assert 0 <= int(case["budget"]) - round(share * n) <= layer
    return {"kept": answer(method, evicting(case)).keep}
