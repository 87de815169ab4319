"""Oracle: the compressed decode itself. Keys K R, axes R and the mean's remainder are stored, logits are
(q R)(K R)^T + q (mu - mu R R^T); a model whose attention computes them must agree with the edited cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.interface import CachedKeys
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import image_columns


def compressed(key: np.ndarray, query: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(K R, R, remainder) of one key head: key (V, D), query (heads of the group, W, D), in double precision."""
    size = key.shape[1]
    mean = key.mean(0)
    covariance = np.zeros((size, size))
    for row in key - mean:
        covariance += np.outer(row, row)
    energy = np.sqrt((query.mean(0) ** 2).sum(0))
    median = sorted(energy)[(size - 1) // 2]
    energy = np.maximum(energy, 1e-3 * median)
    weighted = covariance * np.outer(energy, energy)
    weighted += 1e-4 * max(np.abs(np.diag(weighted)).mean(), 1e-6) * np.eye(size)
    values, vectors = np.linalg.eigh(weighted)
    axes = vectors[:, np.argsort(-values)[: size - int(size * (1 - ratio))]]
    return key @ axes, axes, mean - mean @ axes @ axes.T


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_logits_equal_those_of_the_compressed_form(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 40, 16, generator=generator) * torch.linspace(0.2, 3, 16)
    query = torch.randn(6, 32, 16, generator=generator)
    edited = make_method("rotatek").edit_keys(CachedKeys(0, key, query, ratio)).double().numpy()
    later = torch.randn(5, 16, generator=generator).double().numpy()
    for head in range(2):
        group = query[3 * head : 3 * head + 3].double().numpy()
        small, axes, remainder = compressed(key[head].double().numpy(), group, ratio)
        assert small.shape == (40, round(16 * ratio))
        wanted = (later @ axes) @ small.T + (later @ remainder)[:, None]
        assert np.abs(later @ edited[head].T - wanted).max() < 1e-3


def test_inside_a_model() -> None:
    """Decoding on the edited cache equals decoding on a stock cache whose visual keys were replaced by hand."""
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs = {key: value for key, value in make_inputs("t5 i0 t40").items() if key != "attention_mask"}
    visual = image_columns("qwen2_5_vl", inputs)
    size = model.config.text_config.hidden_size // model.config.text_config.num_attention_heads
    text, caught = model.model.language_model, {}

    def remember(index: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            caught.setdefault(
                index, (kwargs.get("hidden_states", args[0] if args else None), kwargs["position_embeddings"])
            )

        return hook

    handles = [
        layer.self_attn.register_forward_pre_hook(remember(i), with_kwargs=True) for i, layer in enumerate(text.layers)
    ]
    with torch.no_grad():
        plain = model(**inputs, use_cache=True)
    for handle in handles:
        handle.remove()
    for index, layer in enumerate(text.layers):
        hidden, (cos, sin) = caught[index]
        query = layer.self_attn.q_proj(hidden)[0].view(-1, 4, size).transpose(0, 1)
        turned = torch.cat((-query[..., size // 2 :], query[..., : size // 2]), dim=-1)
        query = (query * cos[0] + turned * sin[0])[:, -32:]
        cache = plain.past_key_values.layers[index]
        for head in range(2):
            group = query[2 * head : 2 * head + 2].double().numpy()
            small, axes, remainder = compressed(cache.keys[0, head, visual].double().numpy(), group, 0.25)
            cache.keys[0, head, visual] = torch.from_numpy(small @ axes.T + remainder).float()
    next_id = plain.logits[:, -1:].argmax(-1)
    with torch.no_grad():
        wanted = model(input_ids=next_id, past_key_values=plain.past_key_values).logits
        with ivcp_eval.prune(model, "rotatek", 0.25) as run:
            pruned = model(**inputs, use_cache=True)
            got = model(input_ids=next_id, past_key_values=pruned.past_key_values).logits
        uncompressed = model(**inputs, use_cache=True)
        untouched = model(input_ids=next_id, past_key_values=uncompressed.past_key_values).logits
    assert torch.equal(pruned.logits, plain.logits), "the prefill sees whole keys"
    assert run.kept_ratio == 1
    assert torch.allclose(got, wanted, atol=1e-3)
    assert not torch.allclose(got, untouched, atol=1e-2), "an oracle that cannot fail"


def batch_rows(ratio: float, *layouts: str) -> list[Tensor]:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with ivcp_eval.prune(model, "rotatek", ratio):
        out = model.generate(
            **make_inputs(*layouts), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return list(torch.stack(out.logits, dim=1))


def test_rows_of_a_batch_and_one_token_images() -> None:
    layouts = ("t5 i0 t9", "t4 i1 t3 i2 t6", "t12", "t4 i3 t5")
    together = batch_rows(0.5, *layouts)
    for row, layout in enumerate(layouts):
        assert torch.allclose(together[row], batch_rows(0.5, layout)[0], atol=1e-3)
    assert torch.allclose(batch_rows(0.5, "t4 i3 t5")[0], batch_rows(1.0, "t4 i3 t5")[0], atol=1e-3), (
        "one token is its own mean"
    )


def test_without_a_cache_it_is_refused() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with pytest.raises(ValueError, match="use_cache=False"), ivcp_eval.prune(model, "rotatek", 0.5), torch.no_grad():
        model(**make_inputs("t5 i0 t9"), use_cache=False)
