"""Oracle: what DyCoke's decoding steps see, of recorded attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ivcp_eval.methods.dycoke import Method
from tests.methods.oracle import Case


def outputs(case: Case) -> dict[str, Tensor]:
    method, before = Method(hide=float(case["ratio"])), None
    first, n = int(case["image_start"]), int(case["image_length"])
    made, pruned, similarity = {}, [], []
    for step in range(int(case["steps"])):
        attention = case[f"attention_step{step}"].mean(dim=0)
        seen = torch.ones_like(attention, dtype=torch.bool)
        now = attention[first : first + n]
        visible = method.visible(now, before)
        if visible is not None:
            seen[first : first + n] = visible
        made[f"visible_step{step}"] = seen.nonzero().flatten()
        pruned.append(visible is not None)
        similarity.append(0.0 if before is None else float(cosine_similarity(now, before, dim=0)))
        before = now
    return {**made, "pruned": torch.tensor(pruned), "similarity": torch.tensor(similarity)}
