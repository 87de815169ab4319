"""Oracle: AOT's stage across frames."""

from __future__ import annotations

import torch
from torch import Tensor

from ivcp_eval.methods.aot import Method
from tests.methods.oracle import Case


def outputs(case: Case) -> dict[str, Tensor]:
    method = Method(apart=float(case["keep_ratio"]), handed=float(case["scaling"]))
    tokens = [mask.nonzero().flatten() for mask in case["kept_mask"]]
    states = [frame[own] for frame, own in zip(case["features"], tokens, strict=True)]
    features, kinds, frames, places = [], [], [], []
    for first, length in case["segments"].tolist():
        inside = states[first : first + length]
        stay = [method._stay(len(later)) for later in inside[1:]]
        apart, ends = method.across([later[None] for later in inside], stay)
        apart, ends = [own[0] for own in apart], ends[0]
        rows = [(0, first, torch.arange(len(inside[0])), inside[0])]
        rows += [(1, first + j, own, inside[j][own]) for j, own in enumerate(apart, 1)]
        rows += [(2, first, rows[0][2], ends @ torch.cat(inside))] if length > 1 else []
        for kind, frame, own, made in rows:
            features.append(made)
            kinds.append(torch.full((len(own),), kind))
            frames.append(torch.full((len(own),), frame))
            places.append(tokens[frame][own])
    return {
        "output_features": torch.cat(features),
        "output_kind": torch.cat(kinds),
        "output_frame": torch.cat(frames),
        "output_token": torch.cat(places),
    }
