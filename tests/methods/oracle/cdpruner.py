"""Oracle: CDPruner's selection, given the authors' relevance, which needs CLIP's text tower."""

from __future__ import annotations

from torch import Tensor

from ivcp_eval.interface.ops import unit_rows
from ivcp_eval.methods.cdpruner import conditional_volume
from tests.methods.oracle import Case


def outputs(case: Case) -> dict[str, Tensor]:
    image, text = unit_rows(case["clip_image_embeds"]), unit_rows(case["clip_text_embeds"])
    relevance = -(image @ text.T).mean(dim=1)
    weight = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    order = conditional_volume(case["projected_features"], weight, int(case["visual_token_num"]))
    return {"selection_order": order, "kept": order.sort().values}
