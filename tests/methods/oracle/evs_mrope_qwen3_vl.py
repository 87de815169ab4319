"""Oracle: positions that vLLM gives the survivors of EVS in Qwen3-VL, whose frames stand between time stamps."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from tests.methods.oracle import Case
from tests.methods.oracle.evs_mrope import unpruned


def outputs(case: Case) -> dict[str, Tensor]:
    video, ids, (frames, rows, columns) = int(case["video_token"]), case["input_ids"], case["grid"].tolist()
    start = int((ids == video).nonzero()[0])
    first = start - int(case["timestamp_tokens"]) - 1
    end = start + len(case["kept"])
    frame = torch.cat((ids[first:start], torch.full((rows * columns,), video), ids[end : end + 1]))
    behind = first + frames * (len(frame) - rows * columns) + len(case["kept"])
    whole = torch.cat((ids[:first], frame.repeat(frames), ids[behind:]))
    alive = whole != video
    alive[(~alive).nonzero().flatten()[case["kept"]]] = True
    positions = unpruned(Qwen3VLModel, whole, video, case["grid"][None])[:, alive]
    media = slice(first, behind)
    kinds = torch.stack((whole == case["vision_start"], whole == video)).long()[:, alive]
    return {
        "positions": positions,
        "delta": positions.max() + 1 - positions.shape[1],
        "media_positions": torch.cat((positions - positions[:, first : first + 1], kinds))[:, media],
    }
