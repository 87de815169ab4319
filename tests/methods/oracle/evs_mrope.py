"""Oracle: positions that vLLM gives the survivors of EVS in Qwen2.5-VL: those of the unpruned prompt, which stay here.

Where vLLM differs (see `evs`), what differs is put in its place: whole seconds, and text that counts on from the width
of a grid that is higher than wide.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from ivcp_eval.interface import ModelFacts
from ivcp_eval.methods.evs import Method
from tests.methods.oracle import Case

MERGED = 2  # patches to a token, along either axis


def outputs(case: Case) -> dict[str, Tensor]:
    video, ids = int(case["video_token"]), case["input_ids"]
    names = [name.removesuffix("_kept") for name in sorted(case) if name.endswith("_kept")]
    grids, kept = ([case[f"{name}_{part}"] for name in names] for part in ("grid", "kept"))
    whole, alive = ids, torch.ones_like(ids, dtype=torch.bool)
    first = int((ids == video).nonzero()[0])
    for grid, own in zip(grids, kept, strict=True):
        shown = torch.zeros(int(grid.prod()), dtype=torch.bool)
        shown[own] = True
        behind = first + len(own)
        whole = torch.cat((whole[:first], torch.full_like(shown, video, dtype=torch.int64), whole[behind:]))
        alive = torch.cat((alive[:first], shown, alive[behind:]))
        rest = (whole[first + len(shown) :] == video).nonzero()
        first += len(shown) + int(rest[0]) if len(rest) else 0
    pace = [int(case[f"{names[0]}_tokens_per_second"]), *(int(case[f"{n}_second_per_grid"]) for n in names)]
    positions = unpruned(Qwen2_5_VLModel, whole, video, torch.stack(grids), pace[0], pace[1:])[:, alive]
    made = {"positions": positions}
    columns = (ids == video).nonzero().flatten().split([len(own) for own in kept])
    for name, grid, own in zip(names, grids, columns, strict=True):
        start = positions[:, own[0] - 1] + 1
        made[f"{name}_positions"] = torch.cat((positions[:, own] - start[:, None], grid[2].expand(1, len(own))))
        positions[:, own[-1] + 1 :] -= (grid[1] - grid[2]).clamp_min(0)
    return {**made, "delta": positions.max() + 1 - positions.shape[1]}


def unpruned(
    model: Any, ids: Tensor, video: int, grids: Tensor, tokens_per_second: int = 1, seconds: Any = None
) -> Tensor:
    """(3, S) positions that transformers gives a whole prompt, from where a method that keeps them lets them stay."""
    (cut,) = Method().cuts(ModelFacts("qwen", 28, position_axes=3), 0.5)
    assert not cut.renumber
    vision = SimpleNamespace(spatial_merge_size=MERGED, tokens_per_second=tokens_per_second)
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    stand_in.get_vision_position_ids = partial(Qwen2_5_VLModel.get_vision_position_ids, stand_in)
    sides = grids * torch.tensor([1, MERGED, MERGED])
    options = {"video_grid_thw": sides, "second_per_grid_ts": seconds}
    positions, _ = model.get_rope_index(stand_in, ids[None], 2 * (ids == video).int()[None], **options)
    return positions[:, 0]
