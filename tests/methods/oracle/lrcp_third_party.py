"""Oracle: a third party's port of LRCP (no authors' code exists), and its merged features but for an evident slip."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.interface.ops import ranking
from ivcp_eval.methods.lrcp import Method, residual
from tests.methods.oracle import Case, answer, merged, one_image


def outputs(case: Case) -> dict[str, Tensor]:
    states, keep, rank = case["embeddings"], int(case["keep"]), int(case["subspace_dim"])
    selection = answer(Method(rank=rank), one_image(len(states), keep, hidden=states))
    assert selection.merge is not None
    order = ranking(residual(states, rank))[:keep]
    alone = (selection.merge.to_dense() > 0).sum(dim=1) == 1
    features = merged(selection, states)
    features[alone] /= 2  # what the port makes of a token that nothing joins
    return {
        "kept": selection.keep,
        "order": order,
        "merged_in_order": features[torch.searchsorted(selection.keep, order)],
    }
