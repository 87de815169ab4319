"""Oracle: HoliTom's stage inside the language model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ivcp_eval.methods.holitom import Method
from tests.methods.oracle import Case, answer, merged, one_clip


def outputs(case: Case) -> dict[str, Tensor]:
    start, length, states = int(case["image_start"]), int(case["image_length"]), case["hidden_states"]
    behind = len(states) - start - length
    signals = one_clip(states[None, start : start + length], 1, start=start, behind=behind)
    signals = replace(signals, stage=1, attention=lambda rows, entering=False: case["last_query_attention"][:, None])
    selection = answer(Method(counts="released", inside=1 - float(case["ratio"])), signals)
    columns = torch.cat((torch.arange(start), start + selection.keep, torch.arange(start + length, len(states))))
    became = states.clone()
    became[start + selection.keep] = merged(selection, states[start : start + length])
    return {"kept_columns": columns, "position_ids": columns, "merged_hidden_states": became[columns]}
