"""Oracle: PruMerge's encoder, adaptive counts and merged features included."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ivcp_eval.engine.signals.vision import patch_signals
from ivcp_eval.interface import PatchStates
from ivcp_eval.methods.prumerge import Method
from tests.methods.oracle import Case, answer, merged, one_image

HEADS, CLASS_TOKEN = 4, 1


def outputs(case: Case, method: Any = None) -> dict[str, Tensor]:
    method = method or Method(counts="outliers")
    query, key = (case[f"layer23_{name}"].unflatten(1, (HEADS, -1)).transpose(0, 1) for name in ("query", "key"))
    states = PatchStates(query, key, (query.shape[1],), query.shape[2] ** -0.5, class_token=True)
    tower = {name: value[CLASS_TOKEN:] for name, value in patch_signals(states, Method.tower_signals).items()}
    hidden = case["hidden_states_with_cls"][CLASS_TOKEN:]
    signals = one_image(len(hidden), 0, hidden=hidden, vision=tower)
    selection = answer(method, signals)
    centres = method.centres(tower["joint_cls"], 0)
    return {
        "cls_attention": tower["joint_cls"],
        "centres_in_output_order": centres,
        "kept": centres.sort().values,
        "output_features": merged(selection, hidden),
    }
