"""Oracle: ``key_pruner_query_driven``, where no token is recent."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.interface import CachedKeys
from ivcp_eval.methods.think import Method
from tests.methods.oracle import Case


def outputs(case: Case) -> dict[str, Tensor]:
    query, key = case["query"][:, -Method.query_window :], case["key"]
    edited = Method().edit_keys(CachedKeys(0, key, query, 1 - float(case["pruned"])))
    stays = (edited != 0).any(dim=1)
    return {
        "stays": stays.long(),
        "compact": edited.transpose(1, 2)[stays].unflatten(0, (len(key), -1)).transpose(1, 2),
    }
