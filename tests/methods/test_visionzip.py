"""Oracle: the formula with Python loops; transformers' own attention maps of ViTs; a literal block of Qwen's towers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

import ivcp_eval
from ivcp_eval.engine.signals.vision import patch_signals
from ivcp_eval.interface import PatchStates, Selection, Signals, TowerFacts
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods.visionzip import Method as VisionZip
from model_adapters._vision import window_order
from tests.engine import tiny_models
from tests.methods.material import best, random_signals


def formula(
    importance: list[float], key: Tensor, hidden: Tensor, n_dominant: int, n_contextual: int, cls: bool = False
) -> dict[int, Tensor]:
    """Token -> its state afterwards, one image; with a class token, the best token left stands for it in the end."""
    if cls:
        out = formula(importance, key, hidden, n_dominant - 1, n_contextual)
        left = max((i for i in range(len(importance)) if i not in out), key=lambda i: (importance[i], -i))
        return out | {left: hidden[left]}
    dominant = best(importance, n_dominant)
    rest = [i for i in range(len(importance)) if i not in dominant]
    out = {i: hidden[i] for i in dominant}
    if not n_contextual:
        return out
    step = max(1, len(rest) // n_contextual)
    targets = rest[::step][:n_contextual]
    groups: dict[int, list[int]] = {t: [] for t in targets}
    for i in (i for i in rest if i not in targets):
        cosine = {t: float(key[i] @ key[t] / (key[i].norm() * key[t].norm())) for t in targets}
        groups[max(targets, key=lambda t: (cosine[t], -t))].append(i)
    for target, members in groups.items():
        merged = sum((hidden[i] for i in members), torch.zeros_like(hidden[0])) / max(1, len(members))
        out[target] = hidden[target] + merged
    return out


def result(signals: Signals, **parameters: Any) -> dict[int, Tensor]:
    selection = make_method("visionzip", parameters).select(signals)
    assert selection.merge is not None
    states = selection.merge @ signals.hidden[signals.visual]
    return dict(zip(selection.keep.tolist(), states, strict=True))


@pytest.mark.parametrize("contextual", [0.0, 10 / 64, 0.6])
@pytest.mark.parametrize("cls", [False, True])
def test_formula(contextual: float, cls: bool) -> None:
    signals = random_signals((5, 6), (3, 4), ratio=0.4)
    importance = signals.vision["received"]
    if cls:
        importance = torch.randn(42, generator=torch.Generator().manual_seed(9))
        signals = replace(signals, vision={**signals.vision, "cls": importance})
    hidden, key = signals.hidden[signals.visual], signals.vision["key"]
    wanted: dict[int, Tensor] = {}
    for start, n, budget in ((0, 30, 12), (30, 12, 5)):
        part = slice(start, start + n)
        n_contextual = min(round(contextual * budget), budget - 1)
        one = formula(importance[part].tolist(), key[part], hidden[part], budget - n_contextual, n_contextual, cls)
        wanted |= {start + token: state for token, state in one.items()}
    got = result(signals, contextual=contextual)
    assert sorted(got) == sorted(wanted)
    for token, state in wanted.items():
        assert torch.allclose(got[token], state, atol=1e-5)


def test_published_split() -> None:
    signals = random_signals((24, 24), ratio=64 / 576)
    selection = make_method("visionzip").select(signals)
    assert selection.merge is not None
    total = selection.merge.to_dense().sum(1)
    assert int((total > 1.5).sum()) == 10, "64 tokens are 54 dominant and 10 contextual ones"


def test_received_attention_is_chunked_right() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 700, 8, generator=generator) for _ in range(2))
    got = patch_signals(PatchStates(query, key, (500, 200), 0.3), frozenset({"received"}))
    for start, end in ((0, 500), (500, 700)):
        attention = (query[:, start:end] @ key[:, start:end].transpose(1, 2) * 0.3).softmax(-1)
        assert torch.allclose(got["received"][start:end], attention.mean(0).sum(0), atol=1e-5)
    assert float(got["received"].sum()) == pytest.approx(700, rel=1e-5)


def heard(family: str, inputs: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The vision signals of every row, as a method gets them."""
    method, seen = make_method("visionzip"), []
    select = type(method).select

    def listening(signals: Signals) -> Any:
        seen.append(dict(signals.vision))
        return select(method, signals)  # type: ignore[arg-type]

    object.__setattr__(method, "select", listening)
    model, _ = tiny_models.build(family)
    with ivcp_eval.prune(model, method, 0.5), torch.no_grad():
        model(**inputs)
    return seen


def test_class_token_of_clip() -> None:
    inputs = tiny_models.make_inputs("llava", "t5 i0 t9", "t4 i0 t3")
    model, _ = tiny_models.build("llava", attn="eager")
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    layer = model.config.vision_feature_layer
    rows = heard("llava", inputs)
    assert len(rows) == 2
    for row, signals in enumerate(rows):
        attention = tower.attentions[layer][row]  # (heads, patches + 1, patches + 1)
        assert torch.allclose(signals["cls"], attention[:, 0, 1:].mean(0), atol=1e-5)
        assert torch.allclose(signals["received"], attention.mean(0).sum(0)[1:], atol=1e-5)
        assert torch.allclose(signals["feature"], tower.hidden_states[layer][row, 1:], atol=1e-5)


def test_named_blocks_and_joined_heads_of_clip() -> None:
    """Every block of the tower by a name, against transformers' own maps and keys."""

    @dataclass(frozen=True)
    class Listening(VisionZip):
        tower_signals = frozenset({"cls", "received", "feature", "joint_cls", "joint_key"})

        def tower_blocks(self, tower: TowerFacts) -> dict[str, int]:
            own = model.config.vision_feature_layer % tower.n_blocks
            assert (tower.own, tower.class_token, tower.whole) == (own, True, tuple(range(tower.n_blocks)))
            return {str(number): number for number in range(tower.n_blocks)}

        def select(self, signals: Signals) -> Selection:
            seen.append(dict(signals.vision))
            return Selection(torch.arange(signals.budget))

    inputs, seen = tiny_models.make_inputs("llava", "t5 i0 t9", "t4 i0 t3"), []
    model: Any
    model, _ = tiny_models.build("llava", attn="eager")
    layers = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).encoder.layers
    heard: dict[tuple[int, str], Tensor] = {}
    hooks = [
        getattr(layer.self_attn, f"{name}_proj").register_forward_hook(
            lambda _m, _a, out, at=(number, name): heard.update({at: out})
        )
        for number, layer in enumerate(layers)
        for name in ("q", "k")
    ]
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    with ivcp_eval.prune(model, Listening(), 0.5), torch.no_grad():
        model(**inputs)
    assert len(seen) == 2
    for row, signals in enumerate(seen):
        for number, attention in enumerate(tower.attentions):
            query, key = (heard[number, name][row] for name in ("q", "k"))
            joint = (query[0] @ key.T / key.shape[1] ** 0.5).softmax(dim=0)[1:]
            assert torch.allclose(signals[f"{number}/cls"], attention[row][:, 0, 1:].mean(0), atol=1e-5)
            assert torch.allclose(signals[f"{number}/received"], attention[row].mean(0).sum(0)[1:], atol=1e-5)
            assert torch.allclose(signals[f"{number}/feature"], tower.hidden_states[number + 1][row, 1:], atol=1e-5)
            assert torch.allclose(signals[f"{number}/joint_key"], key[1:], atol=1e-5)
            assert torch.allclose(signals[f"{number}/joint_cls"], joint, atol=1e-5)


def test_blocks_of_windowed_and_of_other_towers() -> None:
    clip, windowed = TowerFacts(24, 22, tuple(range(24)), True), TowerFacts(32, 31, (7, 15, 23, 31), False)
    vscan, hiprune = make_method("vscan"), make_method("hiprune")
    assert vscan.tower_blocks(clip) == {"": 22, "early": 5}
    assert vscan.tower_blocks(windowed) == {"": 31, "early": 7}
    assert hiprune.tower_blocks(clip) == {"": 22, "middle": 8}
    assert hiprune.tower_blocks(windowed) == {"": 31, "middle": 15}
    assert windowed.at(0.99) == 31


def test_a_block_that_is_not_there_is_named() -> None:
    @dataclass(frozen=True)
    class Deep(VisionZip):
        def tower_blocks(self, tower: TowerFacts) -> dict[str, int]:
            return {"": 99}

    model, _ = tiny_models.build("llava")
    with pytest.raises(ValueError, match=r"listens to block 99 .* blocks 0\.\."), ivcp_eval.prune(model, Deep(), 0.5):
        pass


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_tower(family: str) -> None:
    """The last block, literally: stock RoPE and stock window order, one softmax map per image and head."""
    inputs = tiny_models.make_inputs(family, "t5 i0 t9", "t4 i1 t3 i2 t6")
    model: Any
    model, _ = tiny_models.build(family)
    tower = model.model.visual
    windowed = family == "qwen2_5_vl"
    block, caught = tower.blocks[max(tower.fullatt_block_indexes) if windowed else -1].attn, {}
    handle = block.register_forward_pre_hook(
        lambda _m, a, kw: caught.update(kw, x=a[0] if a else kw["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    handle.remove()
    x, heads = caught["x"], block.num_heads
    qkv = block.qkv(x).reshape(x.shape[0], 3, heads, -1)
    query, key = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *caught["position_embeddings"])
    received, start = torch.zeros(x.shape[0]), 0
    for _, height, width in inputs["image_grid_thw"].tolist():
        part = slice(start, start + height * width)
        for head in range(heads):
            logits = query[part, head] @ key[part, head].T / query.shape[-1] ** 0.5
            received[part] += logits.softmax(-1).sum(0) / heads
        start += height * width
    index = torch.arange(x.shape[0] // 4)
    if windowed:
        index, _ = get_vision_window_index(
            inputs["image_grid_thw"], spatial_merge_size=2, window_size=tower.window_size, patch_size=14
        )
    wanted, wanted_key = torch.zeros(len(index)), torch.zeros(len(index), key.shape[-1])
    for place, unit in enumerate(index.tolist()):  # the unit that stands at `place` inside the tower
        wanted[unit] = received[4 * place : 4 * place + 4].mean()
        wanted_key[unit] = key[4 * place : 4 * place + 4].mean(dim=(0, 1))
    rows = heard(family, inputs)
    assert torch.allclose(torch.cat([row["received"] for row in rows]), wanted, atol=1e-4)
    assert torch.allclose(torch.cat([row["key"] for row in rows]), wanted_key, atol=1e-4)


def received_in(family: str, pixels: Tensor) -> Tensor:
    """(views, patches) attention that every patch receives in the last block, by the eager tower's own maps."""
    model: Any
    model, _ = tiny_models.build(family, attn="eager")
    with torch.no_grad():
        attention = model.model.vision_tower(pixels, output_attentions=True).attentions[-1]
    return attention.mean(1).sum(1)  # type: ignore[no-any-return]


def test_internvl_tower() -> None:
    """Pooled by the stock pixel shuffle, class tokens left out."""
    inputs = tiny_models.make_inputs("internvl", "t5 i0 t9", "t4 i1 t3 i0 t6")
    received = received_in("internvl", inputs["pixel_values"])[:, 1:]
    side = round(received.shape[1] ** 0.5)
    model: Any
    model, _ = tiny_models.build("internvl")
    shuffled = model.model.pixel_shuffle(received.view(-1, side, side, 1), model.config.downsample_ratio)
    rows = heard("internvl", inputs)
    assert torch.allclose(torch.cat([row["received"] for row in rows]), shuffled.mean(-1).flatten(), atol=1e-4)


def test_deepseek_tower() -> None:
    """Pooled cell by cell; newlines are the mean of their row, the separator that of the image."""
    inputs = tiny_models.make_inputs("deepseek_vl2", "t5 i0 t9", "t4 i1 t3 i0 t6")
    model: Any
    model, _ = tiny_models.build("deepseek_vl2")
    crops = [[(w, h) for w, h in row if w and h] for row in inputs["images_spatial_crop"].tolist()]
    views = [sum(1 + w * h for w, h in row) for row in crops]
    pixels = torch.cat([row[:n] for row, n in zip(inputs["pixel_values"], views, strict=True)])
    received = received_in("deepseek_vl2", pixels)
    side, ratio = model.config.view_side, model.config.projector_config["downsample_ratio"]
    across = round(received.shape[1] ** 0.5)

    def cell(view: Tensor, y: int, x: int) -> float:
        inside = [(r, c) for r in range(y * ratio, (y + 1) * ratio) for c in range(x * ratio, (x + 1) * ratio)]
        patches = [float(view[r * across + c]) for r, c in inside if r < across and c < across]
        return sum(patches) / len(patches)

    def lines(grid: Tensor) -> list[float]:
        return [value for cells in grid.tolist() for value in (*cells, sum(cells) / len(cells))]

    pooled = torch.tensor([[[cell(view, y, x) for x in range(side)] for y in range(side)] for view in received])
    at = 0
    for row, signals in zip(crops, heard("deepseek_vl2", inputs), strict=True):
        wanted: list[float] = []
        for w, h in row:
            tiles, at = pooled[at : at + 1 + w * h], at + 1 + w * h
            grid = tiles[1:].view(h, w, side, side).transpose(1, 2).reshape(h * side, w * side)
            parts = [lines(tiles[0]), [float(tiles.mean())], lines(grid)]
            wanted += itertools.chain.from_iterable(parts if model.config.global_view_pos == "head" else parts[::-1])
        assert torch.allclose(signals["received"], torch.tensor(wanted), atol=1e-4)


@pytest.mark.parametrize("side", [2, 4, 8])
def test_window_order_is_the_stock_one(side: int) -> None:
    for grids in ([(1, 4, 6), (1, 3, 5)], [(1, 9, 11), (2, 1, 1), (1, 13, 4)]):
        thw = torch.tensor([(t, 2 * rows, 2 * columns) for t, rows, columns in grids])
        stock, _ = get_vision_window_index(thw, spatial_merge_size=2, window_size=side * 28, patch_size=14)
        assert torch.equal(stock, window_order(grids, side))


def test_beams_and_other_images() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    first, second = make_inputs("t5 i0 t9", "t4 i1 t3 i2 t6"), make_inputs("t4 i1 t3")
    with ivcp_eval.prune(model, "visionzip", 0.5) as run:
        greedy = model.generate(**first, max_new_tokens=2, do_sample=False)
        model.generate(**first, max_new_tokens=2, do_sample=False, num_beams=3)
        beams = list(run.kept)
        model.generate(**second, max_new_tokens=2, do_sample=False)
        assert torch.equal(model.generate(**first, max_new_tokens=2, do_sample=False), greedy)
        assert [kept.tolist() for kept in beams[::3]] == [kept.tolist() for kept in run.kept]
    text_only = {key: first[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    mask = first["input_ids"] == tiny_models.family("qwen2_5_vl").IMAGE
    with ivcp_eval.prune(model, "visionzip", 0.5, image_mask=mask), pytest.raises(ValueError, match="encoded 0 visual"):
        model(**text_only)
