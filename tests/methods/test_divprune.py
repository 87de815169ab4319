"""Oracle: algorithm 1 with a full distance matrix and Python loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods._greedy import farthest_points
from tests.engine import tiny_models
from tests.methods.material import image_columns, pruned_columns, random_signals


def algorithm_1(features: Tensor, k: int) -> list[int]:
    n = len(features)
    distance = [[1 - float(a @ b / (a.norm() * b.norm())) for b in features.double()] for a in features.double()]
    nearest = [min(distance[i][j] for j in range(n) if j != i) for i in range(n)] if n > 1 else [0.0]
    chosen = [max(range(n), key=lambda i: (nearest[i], -i))]
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(distance[i][j] for j in chosen), -i)))
    return sorted(chosen)


def test_algorithm() -> None:
    signals = random_signals((4, 6), (3, 4), ratio=0.4)
    visual = signals.hidden[signals.visual]
    wanted = algorithm_1(visual[:24], 10) + [24 + i for i in algorithm_1(visual[24:], 5)]
    assert make_method("divprune").select(signals).keep.tolist() == wanted


def test_inside_a_model() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs = make_inputs("t5 i0 t9")
    visual = image_columns("qwen2_5_vl", inputs)
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    kept = {visual[i] for i in algorithm_1(seen[0][0, visual], len(visual) // 4)}
    wanted = [c for c in range(inputs["input_ids"].shape[1]) if c not in visual or c in kept]
    assert pruned_columns("divprune", "qwen2_5_vl", inputs, 0.25) == [wanted]


@pytest.mark.parametrize("method", ["divprune", "visionzip"])
def test_renumbered_as_in_the_released_code(method: str) -> None:
    """There the language model gets the shorter embeddings, and counts positions from 0."""
    model: Any
    model, make_inputs = tiny_models.build("llava")
    inputs = make_inputs("t5 i0 t9")
    shorter: list[Tensor] = []
    first = model.model.language_model.layers[0].input_layernorm
    with ivcp_eval.prune(model, method, 0.25, renumber=True):
        handle = first.register_forward_pre_hook(lambda _m, args: shorter.append(args[0]))
        got = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        handle.remove()
    with ivcp_eval.prune(model, method, 0.25, renumber=False):
        kept = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert shorter[0].shape[1] == 5 + 4 + 9
    wanted = model.generate(inputs_embeds=shorter[0], max_new_tokens=4, do_sample=False)
    assert got.tolist() == wanted.tolist()
    assert got.tolist() != kept.tolist(), "an oracle that cannot fail"


def test_duplicates_and_single_states() -> None:
    same = torch.ones(6, 3)
    assert farthest_points(same, 4).tolist() == [0, 1, 2, 3]
    assert farthest_points(torch.randn(1, 3), 1).tolist() == [0]
    assert farthest_points(torch.zeros(3, 4), 3).tolist() == [0, 1, 2]
    states = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    assert farthest_points(states, 9).tolist() == algorithm_1(states, 9)
