"""Oracle: ToMe's tower written out, patches really removed and attention weighted by size, on a small CLIP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import ivcp_eval
from ivcp_eval.engine.fork import fork
from ivcp_eval.engine.signals.merging import PatchMerging
from ivcp_eval.interface import Unsupported, registry
from ivcp_eval.interface.registry import make_method
from ivcp_eval.interface.variants import Variant
from ivcp_eval.methods.tome import Method, merged_by_block
from model_adapters._vision import mergeable, vit_layers, vit_tap
from tests.engine import tiny_models

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 6, "num_attention_heads": 3}
PICTURE = {"image_size": 48, "patch_size": 8}  # 36 patches


@dataclass
class Groups:
    """What the tower written out holds of one picture: states of the groups (n, C), and their patches."""

    states: Tensor
    members: list[list[int]]


def written_out(layer: Any, x: Tensor, size: Tensor, r: int, class_token: bool) -> tuple[Tensor, list[list[int]]]:
    """One block of ToMe on ``x`` (n, C) whose rows stand for ``size`` patches; and what each row of the next is of."""
    attention, n = layer.self_attn, len(x)
    inside = layer.layer_norm1(x)
    q, k, v = (
        projection(inside).view(n, attention.num_heads, -1).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    logits = q @ k.transpose(1, 2) * attention.scale + size.log()
    x = x + attention.out_proj((logits.softmax(dim=-1) @ v).transpose(0, 1).flatten(1))
    metric = k.mean(dim=0)
    evens, odds = list(range(0, n, 2)), list(range(1, n, 2))
    cosine = torch.nn.functional.cosine_similarity(metric[evens][:, None], metric[odds][None], dim=-1)
    if class_token:
        cosine[0] = -torch.inf
    likeness, best = cosine.max(dim=1)
    order = likeness.argsort(descending=True).tolist()
    merged, stays = order[:r], order[r:]
    if class_token:
        stays = sorted(stays)
    rows = [[evens[i]] for i in stays] + [
        [odds[j], *(evens[i] for i in merged if int(best[i]) == j)] for j in range(len(odds))
    ]
    x = torch.stack([(x[row] * size[row, None]).sum(dim=0) / size[row].sum() for row in rows])
    return x + layer.mlp(layer.layer_norm2(x)), rows


def tower(model: Any, pixels: Tensor, amounts: tuple[int, ...], class_token: bool) -> Groups:
    """The blocks up to the one whose output is read, on one picture."""
    inner = getattr(model, "vision_model", model)
    x = inner.embeddings(pixels[None])
    x = inner.pre_layrnorm(x) if class_token else x
    x = x[0]
    members = [[i] for i in range(len(x))]
    for layer, r in zip(vit_layers(model), amounts, strict=False):
        size = torch.tensor([float(len(group)) for group in members])
        x, rows = written_out(layer, x, size, r, class_token)
        members = [[patch for row in joined for patch in members[row]] for joined in rows]
    return Groups(x, members)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("left", [30, 9, 2])
@torch.no_grad()
def test_copies_are_tome_with_proportional_attention(kind: str, left: int, attention: str) -> None:
    torch.manual_seed(3)
    config, build = {
        "clip": (CLIPVisionConfig(**SIZES, **PICTURE), CLIPVisionModel),
        "siglip": (SiglipVisionConfig(**SIZES, **PICTURE, vision_use_head=False), SiglipVisionModel),
    }[kind]
    model: Any = build._from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and "norm" not in name:
            parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)  # so that attention is not flat
    own = 4
    tap = mergeable(vit_tap(model, own, class_token=kind == "clip"))
    pixels = torch.randn(2, 3, 48, 48)
    amounts = merged_by_block(36, left, own + 1)
    merging = PatchMerging(tap, Method(), left / 36)
    heard: list[Any] = []
    with hooked(merging):
        handle = tap.blocks[own][1].register_forward_hook(lambda _m, _a, out: heard.append((out, list(merging.groups))))
        model(pixels)
        handle.remove()
    output, groups = heard[0]
    output = output[0] if isinstance(output, tuple) else output
    plain = model(pixels, output_hidden_states=True).hidden_states[own + 1]
    for row in range(2):
        wanted = tower(model, pixels[row], amounts, kind == "clip")
        assert len(wanted.members) == left + (kind == "clip")
        for place, (patches, states) in enumerate(zip(wanted.members, wanted.states, strict=True)):
            assert (groups[row] == place).nonzero().flatten().tolist() == sorted(patches)
            for patch in patches:
                torch.testing.assert_close(output[row, patch], states, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(output, plain, atol=1e-2)


@contextmanager
def hooked(merging: PatchMerging) -> Iterator[None]:
    handles = merging.attach()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_every_block_merges_as_many() -> None:
    assert merged_by_block(576, 288, 23) == (13,) * 22 + (2,)
    assert merged_by_block(576, 576, 3) == (0, 0, 0)
    assert sum(merged_by_block(576, 1, 23)) == 575
    left = 576
    for r in merged_by_block(576, 1, 23):
        assert r <= left // 2
        left -= r
    assert merged_by_block(16, 1, 2) == (8, 4), "a block at most halves them"


def test_one_token_of_each_group_stays() -> None:
    model: Any
    model, make_inputs = tiny_models.build("llava")
    features: list[Tensor] = []
    adapter = registry.adapter("llava")
    first = adapter.text_model(model).layers[0]
    handle = first.register_forward_pre_hook(lambda _m, args: features.append(args[0]))
    try:
        with torch.no_grad(), ivcp_eval.prune(model, "tome", 0.5) as run:
            model(**make_inputs("t5 i0 t9 i0 t6"))
    finally:
        handle.remove()
    assert run.visual_kept == [16]
    states = features[0][0]
    for image in (states[5:21], states[30:46]):
        assert len({tuple(row) for row in (image * 1e4).round().tolist()}) == 8
    kept = [column for column in run.kept[0].tolist() if 5 <= column < 21 or 30 <= column < 46]
    assert len({tuple(row) for row in (states[kept] * 1e4).round().tolist()}) == 16


def test_a_fork_does_not_share_the_merged_tower() -> None:
    model: Any
    model, make_inputs = tiny_models.build("llava")
    inputs = make_inputs("t5 i0 t9")
    variants = [Variant("m"), Variant("m", "tome", 0.5), Variant("m", "visionzip", 0.5)]
    together = fork(model, variants, inputs, max_new_tokens=3)
    for variant, answer in zip(variants, together, strict=True):
        with ivcp_eval.prune(model, variant.method, variant.ratio):
            alone = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert answer.tokens[0].tolist() == alone[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("wrapper", ["+ivc", "+dstp"])
def test_wrappers_refuse_it(wrapper: str) -> None:
    with pytest.raises(ValueError, match="does not save by selecting tokens at a cut"):
        make_method("tome" + wrapper)


def test_where_a_token_is_several_patches_it_says_so() -> None:
    model, _ = tiny_models.build("qwen2_5_vl")
    with pytest.raises(Unsupported, match="a visual token is not one patch"), ivcp_eval.prune(model, "tome", 0.5):
        pass
