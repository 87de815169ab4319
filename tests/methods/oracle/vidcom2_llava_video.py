"""Oracle: the authors' VidCom2 on LLaVA-Video, whose frames have a newline behind every row; these all stay."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.methods.oracle import Case, vidcom2

SIDE = 13


def outputs(case: Case) -> dict[str, Tensor]:
    kept = vidcom2.outputs(case)["kept"]
    row, column = kept // SIDE, kept % SIDE  # rows counted through the video
    in_grid = row * (SIDE + 1) + column
    newlines = torch.arange(len(case["features"]) * SIDE) * (SIDE + 1) + SIDE
    frame = SIDE * (SIDE + 1)
    order = [part[part // frame == t] for t in range(len(case["features"])) for part in (in_grid, newlines)]
    return {"kept_in_output_order": torch.cat(order)}
