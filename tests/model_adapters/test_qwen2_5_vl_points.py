"""The small set of tokens against loops, stock modules and stock prompts; what stays when the large one is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import ivcp_eval
from model_adapters.qwen2_5_vl_points.memory import Memory
from model_adapters.qwen2_5_vl_points.modeling import (
    PointsConfig,
    PointsVisionConfig,
    middles,
    pooling,
    shown,
)
from tests.engine import tiny_models
from tests.engine.tiny_models import parse
from tests.model_adapters.families import _qwen, qwen2_5_vl

FAMILY = "qwen2_5_vl_points"
LAYOUT = "t5 i0 t3 v0 t4 i2 t6"


@pytest.fixture
def model() -> Iterator[Any]:
    """The tiny model, in its mode again afterwards."""
    built: Any = tiny_models.build(FAMILY)[0]
    yield built
    built.config.vision_config.mode = "standby"


def inputs_of(mode: str, *layouts: str) -> dict[str, Any]:
    """The same pixels and text with the placeholders of a mode."""
    rows = [parse(layout) for layout in layouts]
    few = tiny_models.family(FAMILY).few
    tokens = {
        "standby": few,
        "focus": lambda rows, columns: rows * columns,
        "both": lambda rows, columns: rows * columns + few(rows, columns),
    }[mode]
    return _qwen.inputs(rows, 0, patch_size=14, paced=True, tokens=tokens)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (16, 16), (2, 7), (1, 1)])
@pytest.mark.parametrize("most", [(4, 4), (3, 2)])
def test_cells_are_those_of_adaptive_pooling(most: tuple[int, int], grid: tuple[int, int]) -> None:
    values, n = drawn(5, *grid), [min(cells, size) for cells, size in zip(most, grid, strict=True)]
    wanted = adaptive_avg_pool2d(values[None], n)[0].flatten(1).T
    torch.testing.assert_close(pooling(most, grid) @ values.flatten(1).T, wanted)
    places = middles(most, grid)
    cells = pooling(most, grid) > 0
    assert all(cells[cell, place] for cell, place in enumerate(places))
    assert len(places.unique()) == n[0] * n[1]


def test_what_prompts_show() -> None:
    """A video of two steps of 2 x 3 tokens, of which one row of two is the small set."""
    places, full = shown("standby", (1, 2), (2, 2, 3))
    assert places.tolist() == [3, 5, 9, 11]  # the lower middle row, the first and last column
    assert not full.any()
    places, full = shown("both", (1, 2), (2, 2, 3))
    assert places.tolist() == [0, 1, 2, 3, 4, 5, 3, 5, 6, 7, 8, 9, 10, 11, 9, 11]
    assert full.tolist() == [*[True] * 6, False, False] * 2
    assert shown("focus", (1, 2), (2, 2, 3))[0].tolist() == list(range(12))


def test_focus_is_the_stock_model_to_the_bit(model: Any) -> None:
    stock: Any = qwen2_5_vl.model("sdpa").eval()
    stock.generation_config = model.generation_config
    report = stock.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    assert all(".standby." in name for name in report.unexpected_keys)
    model.config.vision_config.mode = "focus"
    inputs = inputs_of("focus", LAYOUT, "t4 i1 t9", "t6")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
        mine, theirs = (m.generate(**inputs, max_new_tokens=3, do_sample=False) for m in (model, stock))
    assert torch.equal(mine, theirs)


def test_the_large_set_never_sees_the_small_one(model: Any) -> None:
    inputs, features = inputs_of("both", LAYOUT), {}
    for mode in ("focus", "standby", "both"):
        model.config.vision_config.mode = mode
        with torch.no_grad():
            found = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        features[mode] = found.pooler_output[0]
    steps = [part.unflatten(0, (3, -1)) for part in (features["focus"], features["standby"])]
    assert [part.shape[1] for part in steps] == [15, 12]
    assert torch.equal(features["both"], torch.cat(steps, 1).flatten(0, 1))


def test_an_untrained_small_set_is_the_large_one_averaged(model: Any) -> None:
    inputs, standby = inputs_of("standby", LAYOUT), model.model.visual.standby
    kept, found = standby.scale.clone(), {}
    try:
        standby.scale.zero_()
        for mode in ("focus", "standby"):
            model.config.vision_config.mode = mode
            with torch.no_grad():
                found[mode] = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    finally:
        standby.scale.copy_(kept)
    grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    assert grids == [(4, 6), (2, 2)]
    for grid, whole, few in zip(grids, found["focus"].pooler_output, found["standby"].pooler_output, strict=True):
        n = (min(3, grid[0]), min(4, grid[1]))
        wanted = adaptive_avg_pool2d(whole.T.unflatten(1, grid)[None], n)[0].flatten(1).T
        torch.testing.assert_close(few, wanted)


def literal_tokens(tower: Any, pixels: Tensor, steps: int, rows: int, columns: int) -> Tensor:
    """The small set of one video before its merger, token by token: see the docstring of `modeling`."""
    standby, config, side = tower.standby, tower.config, tower.window_size // 14 // 2
    order = [  # (step, row, column) of every token of the large set, in the order of the windows
        (t, r + i, c + j)
        for t in range(steps)
        for r in range(0, rows, side)
        for c in range(0, columns, side)
        for i in range(min(side, rows - r))
        for j in range(min(side, columns - c))
    ]
    patches = [(t, 2 * r + i, 2 * c + j) for t, r, c in order for i in (0, 1) for j in (0, 1)]
    states: list[Tensor] = []
    handles = [b.register_forward_pre_hook(lambda _m, args: states.append(args[0])) for b in tower.blocks]
    tower(pixels, grid_thw=torch.tensor([[steps, 2 * rows, 2 * columns]]))
    for handle in handles:
        handle.remove()

    def turned(vector: Tensor, place: tuple[int, int]) -> Tensor:
        angles = (torch.tensor(place)[:, None] * tower.rotary_pos_emb.inv_freq).flatten().repeat(2)
        first, second = vector.chunk(2, -1)
        return vector * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    def heads(block: Any, state: Tensor) -> Tensor:
        return block.attn.qkv(block.norm1(state)).view(3, config.num_heads, -1)

    n = [min(cells, size) for cells, size in zip(standby.most, (rows, columns), strict=True)]
    tokens: dict[tuple[int, int, int], Tensor] = {}
    for t in range(steps):
        raster = torch.zeros(rows, columns, config.hidden_size)
        for number, (step, r, c) in enumerate(order):
            if step == t:
                raster[r, c] = states[0][4 * number : 4 * number + 4].mean(0)
        cells = adaptive_avg_pool2d(raster.permute(2, 0, 1)[None], n)[0]
        for i in range(n[0]):
            for j in range(n[1]):
                tokens[t, i, j] = cells[:, i, j] + standby.tokens[i, j]
    for number, block in enumerate(tower.blocks):
        places = {
            (t, i, j): (2 * int((i + 0.5) * rows / n[0]), 2 * int((j + 0.5) * columns / n[1])) for t, i, j in tokens
        }
        after = {}
        for at, token in tokens.items():
            seen = [(heads(block, states[number][p]), (r, c)) for p, (t, r, c) in enumerate(patches) if t == at[0]] + [
                (heads(block, other), places[o]) for o, other in tokens.items() if o[0] == at[0]
            ]
            query = turned(heads(block, token)[0], places[at])
            keys = torch.stack([turned(part[1], place) for part, place in seen], 1)
            values = torch.stack([part[2] for part, _ in seen], 1)
            shares = (keys @ query[..., None] / query.shape[-1] ** 0.5).softmax(1)
            state = token + block.attn.proj((shares * values).sum(1).flatten())
            after[at] = state + standby.mlps[number](block.norm2(state))
        tokens = after
    timed = {}
    for (t, i, j), token in tokens.items():
        three = {s: standby.qkv(standby.norm(tokens[s, i, j])).view(3, config.num_heads, -1) for s in range(t + 1)}
        query = three[t][0]
        logits = torch.stack([(query * three[s][1]).sum(-1) / query.shape[-1] ** 0.5 for s in range(t + 1)])
        values = torch.stack([three[s][2] for s in range(t + 1)])
        mixed = (logits.softmax(0)[..., None] * values).sum(0)
        timed[t, i, j] = token + standby.time_scale * standby.proj(mixed.flatten())
    return torch.stack([timed[at] for at in sorted(timed)])


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 3, 5)])
def test_the_small_set_is_what_its_description_says(model: Any, grid: tuple[int, int, int]) -> None:
    """Two windows of a picture, and three steps of a video."""
    tower, pixels = model.model.visual, drawn(4 * grid[0] * grid[1] * grid[2], 3 * 2 * 14**2)
    with torch.no_grad():
        whole = tower(pixels, grid_thw=torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]]))
        tokens = literal_tokens(tower, pixels, *grid)
        merged = tower.standby.merger.mlp(tower.standby.merger.ln_q(tokens).repeat(1, 4))
        raster = whole.pooler_output.unflatten(0, grid).permute(0, 3, 1, 2)
        means = adaptive_avg_pool2d(raster, [min(3, grid[1]), min(4, grid[2])]).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(whole.standby, means + tower.standby.scale * merged, atol=2e-4, rtol=2e-4)


def test_text_stands_where_it_stands_in_the_stock_prompt(model: Any) -> None:
    """In two rows of unequal length, padded; and a token of the small set where its cell's middle stands."""
    found = {}
    for mode in ("focus", "standby"):
        model.config.vision_config.mode = mode
        inputs = inputs_of(mode, LAYOUT, "t4 v1 t2 i1 t3", "t5")
        keys = ("input_ids", "mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
        extra = {"second_per_grid_ts": inputs["second_per_grid_ts"]}
        positions, deltas = model.model.get_rope_index(**{key: inputs[key] for key in keys}, **extra)
        text = (inputs["mm_token_type_ids"] == 0) & inputs["attention_mask"].bool()
        lengths = inputs["attention_mask"].sum(1)
        found[mode] = [positions[:, row, text[row]].tolist() for row in range(3)], (deltas[:, 0] + lengths).tolist()
        if mode == "standby":
            picture = (inputs["mm_token_type_ids"][0] == 1).nonzero().flatten()[:12]
            assert positions[1:, 0, picture].tolist() == [
                [6 + int((i + 0.5) * 4 / 3) for i in range(3) for _ in range(4)],
                [6 + int((j + 0.5) * 6 / 4) for _ in range(3) for j in range(4)],
            ]
    assert found["standby"] == found["focus"]


def test_placeholders_of_another_mode_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"24 placeholders for \(1, 4, 6\) .* 'standby' shows 12; encode it"):
        model.generate(**inputs_of("focus", "t5 i0 t3"), max_new_tokens=1)


def test_a_prompt_of_both_sets_is_not_pruned(model: Any) -> None:
    model.config.vision_config.mode = "both"
    with pytest.raises(ValueError, match="mode must be focus or standby"), ivcp_eval.prune(model, "uniform", 0.5):
        model(**inputs_of("both", "t5 i0 t3"))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"mode": "few"}, "one of focus, standby, both, got 'few'"), ({"standby_rows": 0}, "a row and a column at least")],
)
def test_a_tower_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PointsVisionConfig(**change)


def test_a_configuration_is_written_and_read(model: Any) -> None:
    assert PointsConfig(**model.config.to_dict()).to_dict() == model.config.to_dict()


def filled(model: Any, inputs: dict[str, Any]) -> tuple[Memory, Tensor]:
    """A memory of a prompt that shows both sets, and the question behind it."""
    model.config.vision_config.mode = "both"
    memory = Memory(model)
    return memory, memory.see(inputs)


def assert_same_cache(memory: Memory, cache: Any) -> None:
    for mine, theirs in zip(memory.cache.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            n = getattr(mine, name).shape[2]
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name)[:, :, :n], atol=1e-5, rtol=1e-5)


def test_without_the_large_set_it_is_as_if_that_had_never_been(model: Any) -> None:
    """Keys, values and the answer are those of a prompt that shows the small set alone, video and pictures."""
    memory, question = filled(model, inputs_of("both", LAYOUT))
    sizes = (24 + 12, 3 * (15 + 12), 4 + 4)
    assert len(memory) == 5 + 3 + 4 + 3 * 2 + sum(sizes)
    memory.detach()
    assert len(memory) == 5 + 3 + 4 + 3 * 2 + 12 + 3 * 12 + 4
    model.config.vision_config.mode = "standby"
    inputs = inputs_of("standby", LAYOUT)
    with torch.no_grad():
        alone = model(**inputs, use_cache=True)
        said = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=None)
        wanted = said[0, inputs["input_ids"].shape[1] :]
    assert_same_cache(memory, alone.past_key_values)
    assert memory.answer(question, 6).tolist() == wanted.tolist()
    assert memory.answer(question, 6).tolist() == wanted.tolist(), "the first question is forgotten"


def test_who_sees_whom(model: Any) -> None:
    """Against one pass with a mask written pair by pair; the question sees both sets."""
    inputs = inputs_of("both", LAYOUT)
    memory, question = filled(model, inputs)
    ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
    length, shown_until = ids.shape[1], len(memory)
    assert shown_until + question.shape[1] == length
    full = [*memory.full.tolist(), *[False] * question.shape[1]]
    mask = torch.full((length, length), torch.finfo(torch.float32).min)
    for q in range(length):
        for k in range(q + 1):
            if q >= shown_until or full[q] or not full[k]:
                mask[q, k] = 0
    extra = {key: value for key, value in inputs.items() if key not in ("attention_mask", "mm_token_type_ids")}
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    with torch.no_grad():
        positions, _ = model.model.get_rope_index(ids, kinds, **{name: inputs[name] for name in names})
        out = model(**extra, attention_mask=mask[None, None], position_ids=positions, use_cache=True)
    assert_same_cache(memory, out.past_key_values)
    assert memory.answer(question, 1).tolist() == [int(out.logits[0, -1].argmax())]


def test_it_goes_on_from_what_it_saw_and_drops_single_frames(model: Any) -> None:
    """A picture and then a video, one by one or together; the video's second step loses its large set."""
    parts = [inputs_of("both", "t5 i0"), inputs_of("both", "t3 v0 t6")]
    whole = {name: torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "mm_token_type_ids")}
    once, question = filled(model, {**parts[0], **parts[1], **whole})
    memory = Memory(model)
    assert memory.see(parts[0]).numel() == 0
    assert torch.equal(memory.see(parts[1]), question)
    assert_same_cache(memory, once.cache)
    assert memory.frame.unique().tolist() == [-1, 0, 1, 2, 3]
    n = len(memory)
    memory.detach([2])
    assert n - len(memory) == 15
    counts = [(int((memory.frame[memory.full] == f).sum()), int((memory.frame == f).sum())) for f in range(4)]
    assert counts == [(24, 36), (15, 27), (0, 12), (15, 27)]
    memory.detach()
    once.detach()
    assert_same_cache(memory, once.cache)
    assert memory.answer(question, 4).tolist() == once.answer(question, 4).tolist()


def test_memories_that_cannot_be_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config.vision_config.mode = "both"
    with pytest.raises(ValueError, match="one row with a picture or a video, got 2"):
        Memory(model).see(inputs_of("both", "t5 i0 t3", "t5 i0 t3"))
    with pytest.raises(ValueError, match=r"got 1 row\(s\), none of whose"):
        Memory(model).see(inputs_of("both", "t5"))
    monkeypatch.setattr(model.config.text_config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match="takes a mask, sdpa or eager; got flash_attention_2"):
        Memory(model)
