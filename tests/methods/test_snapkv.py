"""Oracle: the votes of the window with Python loops, on random attention and on the maps that a stock model returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.interface import ModelFacts, Selection, Unsupported
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.engine.contract.cases import Case
from tests.methods.material import best, evicting_columns, image_columns, random_signals, stock_attention


def slow(
    maps: Tensor,
    columns: list[list[int]],
    question: list[int],
    ratio: float,
    groups: int,
    window: int,
    kernel: int,
    pool: str = "mean",
) -> list[list[int]]:
    """Per key head the columns that stay; ``maps`` (H, n, n), ``columns`` those of each image."""
    kept: list[list[int]] = [[] for _ in range(groups)]
    per_group = len(maps) // groups
    for image in columns:
        for group in range(groups):
            weights = [0.0] * len(image)
            for head in range(group * per_group, (group + 1) * per_group):
                votes = [sum(float(maps[head, row, c]) for row in question[-window:]) for c in image]
                for i in range(len(image)):
                    near = [votes[j] for j in range(i - kernel // 2, i + kernel // 2 + 1) if 0 <= j < len(image)]
                    weights[i] += (max(near) if pool == "max" else sum(near) / kernel) / per_group
            kept[group] += [image[i] for i in best(weights, budget(ratio, len(image)))]
    return [sorted(columns) for columns in kept]


@pytest.mark.parametrize(("window", "kernel"), [(32, 5), (2, 3), (1, 1)])
@pytest.mark.parametrize(("heads", "pool"), [("own", "mean"), ("shared", "mean"), ("own", "max")])
def test_formula(heads: str, pool: str, window: int, kernel: int) -> None:
    method = make_method("snapkv", {"window": window, "kernel": kernel, "heads": heads, "pooling": pool})
    signals = random_signals((5, 8), (3, 4), ratio=0.3)
    signals = replace(signals, cut=method.cuts(ModelFacts("llava", 8), 0.3)[0])
    maps = signals.attention(torch.arange(signals.hidden.shape[0]))
    images = [(image.tokens + 3).tolist() for image in signals.images]
    wanted = slow(maps, images, signals.question.tolist(), 0.3, 2 if heads == "own" else 1, window, kernel, pool)
    selection = method.select(signals)
    selection.check(signals, "snapkv")
    assert (torch.atleast_2d(selection.keep) + 3).tolist() == wanted
    assert heads == "shared" or wanted[0] != wanted[1]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_in_a_model_every_layer_keeps_by_its_own_attention(family: str) -> None:
    inputs = tiny_models.make_inputs(family, "t5 i0 t9")
    closing = 1 if family == "qwen2_5_vl" else 0
    columns = image_columns(family, inputs)
    question = list(range(columns[-1] + 1 + closing, inputs["input_ids"].shape[1]))
    got = evicting_columns("snapkv", family, inputs, 0.4)
    for layer, attention in enumerate(stock_attention(family, inputs)):
        maps = attention[0]
        assert got[layer] == slow(maps, [columns], question, 0.4, len(got[layer]), 32, 5), f"layer {layer}"
    assert len({str(kept) for kept in got}) > 1


def test_memory_is_freed_and_counted() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs = make_inputs("t5 i0 t9", "t4 i1 t3 i2 t6", "t12")
    with ivcp_eval.prune(model, "snapkv", 0.25) as run, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    visual = [[budget(0.25, n) for n in Case("qwen2_5_vl", "none").image_sizes(row)] for row in ("i0", "i1 i2", "t1")]
    counts = [sum(row) for row in visual]
    assert run.visual_cached == [counts] * len(cache.layers)
    assert run.visual_per_layer == [run.visual_prompt] * len(cache.layers)
    text = (inputs["attention_mask"].sum(1) - torch.tensor(run.visual_prompt)).tolist()
    assert run.kv_lengths == [max(t + v for t, v in zip(text, counts, strict=True))] * len(cache.layers)
    for layer in cache.layers:
        stored = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        assert stored == 2 * layer.keys.numel() * layer.keys.element_size(), "the whole prompt is still held"
        assert layer.keys.shape[-2] == run.kv_lengths[0]
    assert run.kept_ratio == run.layer_mean_ratio == 1
    assert run.cache_ratio == pytest.approx(sum(counts) / sum(run.visual_prompt))


def test_latents_are_shared_by_all_heads() -> None:
    model, make_inputs = tiny_models.build("deepseek_vl2")
    with pytest.raises(Unsupported, match="compressed latents"), ivcp_eval.prune(model, "snapkv", 0.5):
        pass
    with ivcp_eval.prune(model, "snapkv", 0.5, heads="shared") as run:
        model.generate(**make_inputs("t5 i0 t9"), max_new_tokens=2, do_sample=False)
    assert run.visual_cached == [[budget(0.5, run.visual_prompt[0])]] * len(run.visual_cached)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (torch.tensor([[0, 1], [2, 1]]), "not a strictly increasing"),
        (torch.tensor([[0, 1, 2], [0, 1, 2]]), "kept 3 visual tokens, its budget is 2"),
        (torch.tensor([[0, 4], [0, 1]]), "more visual tokens of an image in one head than in another"),
    ],
)
def test_wrong_answers_are_named(keep: Tensor, said: str) -> None:
    signals = random_signals((2, 2), (2, 2), ratio=0.25)
    signals = replace(signals, cut=make_method("snapkv").cuts(ModelFacts("llava", 8), 0.25)[0])
    with pytest.raises(ValueError, match=said):
        Selection(keep).check(signals, "some")


@pytest.mark.parametrize("parameters", [{"kernel": 4}, {"window": 0}, {"heads": "each"}, {"pooling": "sum"}])
def test_refused_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        make_method("snapkv", parameters)
