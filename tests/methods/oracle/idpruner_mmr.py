"""Oracle: IDPruner's selection, given the scores of the trained selector."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.methods.idpruner import Method
from tests.methods.oracle import Case, answer, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    vision = {"received": case["raw_importance"]}
    signals = one_image(len(case["embeddings"]), case["n_kept"], hidden=case["embeddings"], vision=vision)
    method = Method(importance=float(case["mmr_lambda"]), together=int(case["parallel_k"]))
    return {"kept": answer(method, signals).keep}
