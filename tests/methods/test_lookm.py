"""Oracle: pivotal merging with Python loops, on the maps and the cache that a stock model returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import best, image_columns, random_signals, stock_attention


def slow_merge(states: dict[int, Tensor], keys: dict[int, Tensor], keep: list[int], merging: str) -> dict[int, Tensor]:
    """What the kept of ``states`` become; who joins whom is decided by ``keys``. Both by token."""

    def cosine(a: int, b: int) -> float:
        return float(keys[a].double() @ keys[b].double() / (keys[a].double().norm() * keys[b].double().norm()))

    parts = {token: [states[token].double()] for token in keep}
    for token in states:
        if token in keep:
            continue
        pivot = max(keep, key=lambda other: (cosine(token, other), -other))
        if merging == "pivot":
            parts[pivot].append((states[token].double() + states[pivot].double()) / 2)
        else:
            parts[pivot].append(states[token].double() * (1.0 if merging == "average" else cosine(token, pivot)))
    return {token: torch.stack(own).mean(dim=0) for token, own in parts.items()}


@pytest.mark.parametrize(
    ("family", "merging"),
    [("qwen2_5_vl", "pivot"), ("llava", "pivot"), ("qwen2_5_vl", "average"), ("qwen2_5_vl", "weighted")],
)
def test_in_a_model_every_head_merges_what_leaves(family: str, merging: str) -> None:
    model, make_inputs = tiny_models.build(family)
    inputs = make_inputs("t5 i0 t9")
    columns, n = image_columns(family, inputs), inputs["input_ids"].shape[1]
    with torch.no_grad():
        plain = model(**inputs).past_key_values
    with ivcp_eval.prune(model, "lookm", 0.4, merging=merging) as run, torch.no_grad():
        got = model(**inputs).past_key_values
    for layer, attention in enumerate(stock_attention(family, inputs)):
        n_groups = plain.layers[layer].keys.shape[1]
        per_group = attention.shape[1] // n_groups
        for group in range(n_groups):
            heads = attention[0, group * per_group : (group + 1) * per_group]
            weights = [float(heads[:, :, column].sum()) for column in columns]
            keep = [columns[i] for i in best(weights, budget(0.4, len(columns)))]
            keys = {column: plain.layers[layer].keys[0, group, column] for column in columns}
            values = {column: plain.layers[layer].values[0, group, column] for column in columns}
            wanted = [slow_merge(states, keys, keep, merging) for states in (keys, values)]
            slots = [column for column in range(n) if column not in columns or column in keep]
            assert got.layers[layer].keys.shape[2] == len(slots)
            for name, merged in zip(("keys", "values"), wanted, strict=True):
                for slot, column in enumerate(slots):
                    stored = getattr(plain.layers[layer], name)[0, group, column]
                    torch.testing.assert_close(
                        getattr(got.layers[layer], name)[0, group, slot],
                        merged[column].to(stored.dtype) if column in keep else stored,
                        msg=lambda text, at=f"{name} of layer {layer}, head {group}": f"{at}: {text}",
                    )
    assert run.cache_ratio == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("heads", ["own", "shared"])
def test_weights_add_up_and_nothing_joins_where_all_stay(heads: str) -> None:
    for ratio in (0.3, 1.0):
        signals = random_signals((5, 8), (3, 4), ratio=ratio)
        selection = make_method("lookm", {"heads": heads}).select(signals)
        assert selection.merge is not None
        merge = selection.merge.to_dense()
        assert merge.shape == (*selection.keep.shape, signals.n_visual)
        torch.testing.assert_close(merge.sum(dim=-1), torch.ones(selection.keep.shape))
        assert bool((merge > 0).any(dim=-2).all()), "a token went nowhere"
        assert (int((merge > 0).sum()) == selection.keep.numel()) == (ratio == 1)


def test_latents_are_shared_by_all_heads() -> None:
    model, make_inputs = tiny_models.build("deepseek_vl2")
    with pytest.raises(Unsupported, match="compressed latents"), ivcp_eval.prune(model, "lookm", 0.5):
        pass
    with ivcp_eval.prune(model, "lookm", 0.5, heads="shared") as run:
        model.generate(**make_inputs("t5 i0 t9"), max_new_tokens=2, do_sample=False)
    assert run.visual_cached == [[budget(0.5, run.visual_prompt[0])]] * len(run.visual_cached)


@pytest.mark.parametrize("parameters", [{"merging": "mean"}, {"heads": "each"}])
def test_refused_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        make_method("lookm", parameters)
