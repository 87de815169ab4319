"""Oracle: where each token of a tiled image comes from, cell by cell in loops, on transformers' own attention maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.engine.signals.vision import MethodHook
from ivcp_eval.interface import Selection, Signals
from ivcp_eval.methods.visionzip import Method as VisionZip
from model_adapters._vision import newlines_by_row
from tests.engine import tiny_models

NEXT = {
    (56, 56): (2, 2),
    (28, 56): (1, 2),
    (56, 28): (2, 1),
    (30, 60): (1, 2),
    (84, 84): (2, 2),
    (42, 84): (1, 2),
    (84, 42): (2, 1),
}  # (height, width): rows, columns of tiles
ROWS = ("t5 i0 t9", "t4 i1 t3 i2 i3 t6")


def seen(family: str, inputs: dict[str, Any], **options: Any) -> list[Signals]:
    """What a method that needs the vision tower sees in each row."""
    calls: list[Signals] = []

    class Spy(VisionZip):
        def select(self, signals: Signals) -> Selection:
            calls.append(signals)
            return super().select(signals)

    model: Any
    model, _ = tiny_models.build(family)
    with ivcp_eval.prune(model, Spy(), 0.5), torch.no_grad():
        model.generate(**inputs, max_new_tokens=1, do_sample=False, **options) if options else model(**inputs)
    return calls


def per_tile(family: str, inputs: dict[str, Any], counts: list[int]) -> dict[str, Tensor]:
    """(tiles, cells, ...) signals of the unpruned eager tower, whole attention maps and all."""
    model: Any
    model, _ = tiny_models.build(family, attn="eager")
    pixels = torch.cat([tiles[:n] for tiles, n in zip(inputs["pixel_values"], counts, strict=True)])
    number = model.config.vision_feature_layer
    layers = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).encoder.layers
    keys: dict[str, Tensor] = {}
    handle = layers[number].self_attn.k_proj.register_forward_hook(lambda _m, _a, out: keys.update(key=out))
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    handle.remove()
    first = int(family == "llava_next")  # the class token
    attention = tower.attentions[number]
    heads = attention.shape[1]
    made = {
        "received": attention.mean(1).sum(1)[:, first:],
        "key": keys["key"].unflatten(2, (heads, -1)).mean(2)[:, first:],
        "feature": tower.hidden_states[number][:, first:],
    }
    return made | ({"cls": attention[:, :, 0, 1:].mean(1)} if first else {})


def line_of(tiles: Tensor, size: tuple[int, int], grid: tuple[int, int], most: int | None) -> Tensor:
    """One image: overview, then the unpadded grid row by row, each row followed by its mean."""
    line, side = list(tiles[0]), math.isqrt(tiles.shape[1])
    rows, columns = (side * n for n in grid)
    cell = [
        [tiles[1 + (y // side) * grid[1] + x // side, (y % side) * side + x % side] for x in range(columns)]
        for y in range(rows)
    ]
    height, width = size
    if width / height > columns / rows:
        cut = (rows - int(round(height * columns / width, 7))) // 2
        cell = cell[cut : rows - cut]
    else:
        cut = (columns - int(round(width * rows / height, 7))) // 2
        cell = [row[cut : columns - cut] for row in cell]
    if most is not None:
        ratio = math.sqrt(len(cell) * len(cell[0]) / (most * side**2))
        if ratio > 1.1:
            cell = bilinear(cell, int(len(cell) // ratio), int(len(cell[0]) // ratio))
    for row in cell:
        line += [*row, torch.stack(row).mean(0)]
    return torch.stack(line)


def bilinear(cell: list[list[Tensor]], rows: int, columns: int) -> list[list[Tensor]]:
    """Each new cell's centre between the four old centres around it, the border repeated."""

    def around(i: int, new: int, old: int) -> tuple[int, int, float]:
        at = max(0.0, (i + 0.5) * old / new - 0.5)
        low = int(at)
        return low, min(low + 1, old - 1), at - low

    out = []
    for y in range(rows):
        top, bottom, v = around(y, rows, len(cell))
        line = []
        for x in range(columns):
            left, right, u = around(x, columns, len(cell[0]))
            above = cell[top][left] * (1 - u) + cell[top][right] * u
            below = cell[bottom][left] * (1 - u) + cell[bottom][right] * u
            line.append(above * (1 - v) + below * v)
        out.append(line)
    return out


@pytest.mark.parametrize("encoded_before", [False, True])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_every_token_gets_the_signal_of_its_cells(family: str, encoded_before: bool) -> None:
    """Also where `generate` encodes the images before the forward, and with beams, which repeat rows."""
    inputs = tiny_models.make_inputs(family, *ROWS)
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    tiles = [1 + NEXT[size][0] * NEXT[size][1] for size in sizes]
    literal = per_tile(family, inputs, tiles)
    most = 2 if family == "llava_onevision" else None
    calls = seen(family, inputs, **({"num_beams": 2} if encoded_before else {}))
    calls = calls[::2] if encoded_before else calls
    assert len(calls) == len(ROWS)
    assert set(calls[0].vision) == set(literal)
    for name, values in literal.items():
        images = [line_of(part, size, NEXT[size], most) for part, size in zip(values.split(tiles), sizes, strict=True)]
        for signals, wanted in zip(calls, (torch.cat(images[:1]), torch.cat(images[1:])), strict=True):
            assert torch.allclose(signals.vision[name], wanted, atol=1e-5), name


def test_features_are_those_that_the_language_model_gets() -> None:
    """Independent of any layout of ours: a token's input is the projection of its feature, a newline's is learned."""
    model: Any
    model, make_inputs = tiny_models.build("llava_next")
    for signals in seen("llava_next", make_inputs(*ROWS)):
        inputs = signals.hidden[signals.visual]
        newline = torch.eq(inputs, model.model.image_newline).all(1)
        assert 0 < int(newline.sum()) < len(inputs)
        projected = model.model.multi_modal_projector(signals.vision["feature"])
        assert torch.allclose(projected[~newline], inputs[~newline], atol=1e-5)


def test_several_images_of_a_onevision_sample_are_overviews() -> None:
    """One newline behind each, which gets the mean of its overview."""
    ids = torch.tensor([[20, *[503] * 10, *[503] * 10, 21, 22, 23]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 1, 3, 42, 42, generator=torch.Generator().manual_seed(0)),
        "image_sizes": torch.tensor([[84, 84], [42, 84]]),
        "batch_num_images": torch.tensor([2]),
    }
    literal = per_tile("llava_onevision", inputs, [1, 1])
    for options in ({}, {"num_beams": 2}):
        signals = seen("llava_onevision", inputs, **options)[0]
        for name, values in literal.items():
            wanted = torch.cat([part for tile in values for part in (tile, tile.mean(0, keepdim=True))])
            assert torch.allclose(signals.vision[name], wanted, atol=1e-5), name


def test_newlines() -> None:
    values = torch.tensor([1.0, 3.0, 9.0, 9.0, 5.0, 9.0])
    newline = torch.tensor([False, False, True, True, False, True])
    assert newlines_by_row(values, newline).tolist() == [1, 3, 2, 3, 5, 5]  # the empty row gets the mean of all


def test_a_hidden_method_is_visible_again() -> None:
    class Encoder:
        def encode(self, pixels: int, sizes: int = 1) -> int:
            return pixels + sizes

    encoder, heard = Encoder(), []
    hook = MethodHook(encoder, "encode", lambda owner, args, named, result: heard.append((args, named, result)))
    assert encoder.encode(1, sizes=2) == 3
    assert heard == [((), {"pixels": 1, "sizes": 2}, 3)]
    with pytest.raises(ValueError, match=r"Encoder\.encode is replaced"):
        MethodHook(encoder, "encode", lambda *_: None)
    hook.remove()
    hook.remove()
    assert not vars(encoder)


def test_the_method_is_visible_again_after_an_exception() -> None:
    model: Any
    model, make_inputs = tiny_models.build("llava_next")
    inputs = make_inputs("t5 i0 t9")

    def broken() -> None:
        with ivcp_eval.prune(model, "visionzip", 0.5), torch.no_grad():
            assert "get_image_features" in vars(model.model)
            model(**inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert "get_image_features" not in vars(model.model)
