"""DeepSeek-VL2's prompts, tiles and token counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from model_adapters.deepseek_vl2.layout import assemble, n_tokens, padding_cells, spread
from model_adapters.deepseek_vl2.processing import DeepseekVL2Processor, best_resolution
from tests.model_adapters.deepseek_vl2 import checkpoint as published
from tests.model_adapters.deepseek_vl2 import tokenizer as deepseek_vl2_tokenizer

_PUBLISHED_TILES = "1x1 1x2 2x1 1x3 3x1 1x4 4x1 2x2 1x5 5x1 1x6 6x1 2x3 3x2 1x7 7x1 1x8 8x1 2x4 4x2 1x9 9x1 3x3"
PUBLISHED_RESOLUTIONS = [(384 * int(tile[0]), 384 * int(tile[2])) for tile in _PUBLISHED_TILES.split(" ")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeepseekVL2Processor, Tokenizer]:
    folder = tmp_path_factory.mktemp("processor")
    plain = deepseek_vl2_tokenizer.write(folder, published.RESOLUTIONS)
    return DeepseekVL2Processor.from_pretrained(folder), plain


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# -- layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiles", "count"), [((1, 1), 421), ((2, 1), 617), ((1, 2), 631), ((3, 2), 1415), ((3, 3), 2017)]
)
def test_token_counts_of_the_published_sizes(tiles: tuple[int, int], count: int) -> None:
    """The first four are the lengths recorded with the released code; 210 + 1 + 14 h (14 w + 1)."""
    assert n_tokens(14, tiles) == count


@pytest.mark.parametrize("tiles", [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("head", [True, False])
def test_every_token_stands_where_the_formula_says(tiles: tuple[int, int], head: bool) -> None:
    (w, h), g = tiles, 3
    views = torch.arange((1 + w * h) * g * g).view(-1, g * g, 1)
    line = assemble(views, tiles, torch.tensor([-1]), torch.tensor([-2]), head)[:, 0].tolist()
    assert len(line) == n_tokens(g, tiles)
    detail_start, thumbnail_start = (g * (g + 1) + 1, 0) if head else (0, h * g * (w * g + 1) + 1)
    for y in range(g):
        for x in range(g):
            assert line[thumbnail_start + y * (g + 1) + x] == y * g + x
    for y in range(h * g):
        for x in range(w * g):
            view = 1 + (y // g) * w + x // g
            assert line[detail_start + y * (w * g + 1) + x] == view * g * g + (y % g) * g + x % g
    assert line[(thumbnail_start if not head else detail_start) - 1] == -2
    assert line.count(-1) == g + h * g
    assert line.count(-2) == 1


@pytest.mark.parametrize("head", [True, False])
def test_signals_of_cells_reach_tokens_and_newlines_average_their_row(head: bool) -> None:
    values = torch.arange(3 * 4.0).view(3, 4, 1).expand(-1, -1, 2)
    got = spread(values, (2, 1), head)[:, 1].tolist()
    thumbnail, detail = [0, 1, 0.5, 2, 3, 2.5], [4, 5, 8, 9, 6.5, 6, 7, 10, 11, 8.5]
    assert got == ([*thumbnail, 5.5, *detail] if head else [*detail, 5.5, *thumbnail])


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (384, 384), (1000, 20), (20, 1000), (333, 500), (1, 3)])
def test_padding_cells_are_those_the_picture_does_not_touch(size: tuple[int, int]) -> None:
    scale = min(384 / size[0], 384 / size[1])
    shown = np.zeros((392, 392), dtype=bool)
    width, height = int(size[0] * scale), int(size[1] * scale)
    left, top = (384 - width) // 2, (384 - height) // 2
    shown[top : top + height, left : left + width] = True
    empty = ~shown.reshape(14, 28, 14, 28).any(axis=(1, 3))
    expected = [y * 15 + x for y, x in zip(*empty.nonzero(), strict=True)]
    assert list(padding_cells(size, 14, 384, 28)) == expected


# -- tiling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tiles"),
    [
        ((384, 384), (1, 1)),
        ((200, 100), (1, 1)),  # nothing is gained by a larger view: the least waste wins
        ((640, 480), (2, 2)),
        ((1000, 500), (3, 2)),
        ((500, 1000), (2, 3)),
        ((3000, 300), (8, 1)),
        ((4000, 4000), (3, 3)),
        ((385, 200), (2, 1)),
    ],
)
def test_best_resolution(size: tuple[int, int], tiles: tuple[int, int]) -> None:
    assert best_resolution(size, PUBLISHED_RESOLUTIONS) == (384 * tiles[0], 384 * tiles[1])


def test_views_are_the_thumbnail_and_the_tiles_of_the_padded_picture(made: Any) -> None:
    processor, side = made[0], published.IMAGE_SIZE
    image = picture(130, 60)
    assert processor.tiles(image.size) == (2, 1)
    views = processor.views(image, (2, 1))
    assert views.shape == (3, 3, side, side)
    wide = image.resize((140, 65), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (140, 70), (127, 127, 127))
    canvas.paste(wide, (0, 2))
    expected = (torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(torch.cat((views[1], views[2]), dim=-1), expected, atol=0, rtol=0)
    grey = expected[:, 0, 0].view(3, 1, 1)
    torch.testing.assert_close(grey, torch.full((3, 1, 1), (127 / 255 - 0.5) / 0.5))
    assert bool((views[0][:, :15] == grey).all())
    assert bool((views[0][:, -15:] == grey).all())
    assert not bool((views[0][:, 25:45] == grey).all())


def test_images_of_any_mode_are_accepted(made: Any) -> None:
    for mode in ("L", "RGBA", "P", "1"):
        assert made[0].views(picture(80, 90).convert(mode), (1, 1)).shape[0] == 2


# -- prompts ----------------------------------------------------------------------------------------------------


def test_prompt_is_that_of_the_release(made: Any) -> None:
    processor, plain = made
    inputs = processor([user("<image>\nLocate <|ref|>the giraffe<|/ref|>. ")], [[picture(60, 60)]])
    head = plain.encode("<|User|>: ", add_special_tokens=False).ids
    tail = plain.encode("\nLocate <|ref|>the giraffe<|/ref|>.\n\n<|Assistant|>:", add_special_tokens=False).ids
    placeholders = [plain.token_to_id("<image>")] * n_tokens(3, (1, 1))
    assert inputs["input_ids"][0].tolist() == [
        plain.token_to_id(deepseek_vl2_tokenizer.BOS),
        *head,
        *placeholders,
        *tail,
    ]
    assert plain.token_to_id("<|ref|>") in tail
    assert plain.token_to_id("<|Assistant|>") in tail


def test_tokenizer_is_the_file_and_not_what_its_class_name_says(made: Any) -> None:
    """tokenizer_config.json names LlamaTokenizerFast, whose pre-tokenizer would be another."""
    processor, plain = made
    for text in ("The quick  brown\n\nfox? 42", " leading", "naïve ünïcode", "<|det|>[[1, 2]]<|/det|>"):
        assert processor.tokenizer.encode(text, add_special_tokens=False) == plain.encode(text).ids
        assert processor.decode(plain.encode(text).ids) == text


def test_special_tokens_vanish_from_answers(made: Any) -> None:
    processor, plain = made
    ids = plain.encode("<|ref|>dog<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>").ids
    ids = [*ids, 1]
    assert processor.decode(ids, skip_special_tokens=True) == "dog[[1, 2, 3, 4]]"


def test_conversation_of_several_turns(made: Any) -> None:
    processor, plain = made
    turns = [
        {"role": "system", "content": "Describe"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": " A car. "},
        {"role": "user", "content": ""},
    ]
    pieces = ["Describe", "<|User|>: What?\n\n<|Assistant|>:", "A car.", "<|User|>:<|Assistant|>:"]
    encoded = [plain.encode(piece, add_special_tokens=False).ids for piece in pieces]
    expected = [0, *encoded[0], *encoded[1], *encoded[2], 1, *encoded[3]]
    inputs = processor([turns], [[]])
    assert inputs["input_ids"][0].tolist() == expected
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_batch_of_rows_with_other_numbers_of_images(made: Any) -> None:
    processor = made[0]
    rows = [[picture(130, 60, 1)], [], [picture(60, 130, 2), picture(60, 60, 3)]]
    turns = [user("<image>" * len(row) + "What?") for row in rows]
    inputs = processor(turns, rows)
    counts = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    crops = [[(2, 1)], [], [(1, 2), (1, 1)]]
    assert counts == [sum(n_tokens(3, crop) for crop in row) for row in crops]
    assert inputs["images_spatial_crop"].tolist() == [[[2, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 2], [1, 1]]]
    assert inputs["image_sizes"].tolist() == [[[130, 60], [0, 0]], [[0, 0], [0, 0]], [[60, 130], [60, 60]]]
    assert inputs["pixel_values"].shape[:2] == (3, 5)
    for row, turn in enumerate(turns):
        alone = processor([turn], [rows[row]])
        valid = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row][valid].tolist() == alone["input_ids"][0].tolist()
        assert bool(valid[-1])
        if rows[row]:
            views = alone["pixel_values"].shape[1]
            assert torch.equal(inputs["pixel_values"][row, :views], alone["pixel_values"][0])


def test_three_images_are_not_tiled(made: Any) -> None:
    inputs = made[0]([user("<image><image><image>")], [[picture(130, 60)] * 3])
    assert inputs["images_spatial_crop"].tolist() == [[[1, 1]] * 3]


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        (user("What?"), 1, "placeholders"),
        (user("<image><image>"), 1, "placeholders"),
        ([{"role": "assistant", "content": "<image>"}], 1, "role"),
        ([*user("a"), {"role": "system", "content": "b"}], 0, "role"),
        ([{"role": "judge", "content": "b"}], 0, "role"),
    ],
)
def test_conversations_that_cannot_be_meant_are_refused(
    made: Any, turns: list[dict[str, str]], images: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made[0]([turns], [[picture(60, 60)] * images])


def test_missing_special_tokens_are_added(tmp_path: Path) -> None:
    plain = deepseek_vl2_tokenizer.write(tmp_path, published.RESOLUTIONS, with_image_token=False)
    processor = DeepseekVL2Processor.from_pretrained(tmp_path)
    assert plain.token_to_id("<image>") is None
    assert processor.image_token_id == plain.get_vocab_size()


def test_saved_processor_is_read_back(made: Any, tmp_path: Path) -> None:
    processor = made[0]
    processor.save_pretrained(tmp_path)
    again = DeepseekVL2Processor.from_pretrained(tmp_path)
    turns, images = [user("<image>\nWhat <|ref|>car<|/ref|>?")], [[picture(130, 60)]]
    first, second = processor(turns, images), again(turns, images)
    assert all(torch.equal(first[key], second[key]) for key in first)
