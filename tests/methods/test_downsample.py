"""Oracle: the grid by brute force, and the number of tokens that the real processors make of the result."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import (
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

import ivcp_eval
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.models import locate
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import adapter, make_method
from ivcp_eval.interface.variants import Variant
from ivcp_eval.lab.tiny.processor import build_processor
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement
from model_adapters._shrink import shrink, shrunk_grid, shrunk_to_count
from model_adapters.deepseek_vl2.processing import DeepseekVL2Processor
from tests.engine import tiny_models
from tests.model_adapters.deepseek_vl2 import tokenizer as deepseek_vl2_tokenizer


@pytest.mark.parametrize("share", [0.11, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 9), (12, 16), (40, 30), (1, 30)])
def test_grid(rows: int, columns: int, share: float) -> None:
    allowed = budget(share, rows * columns)
    r, c = shrunk_grid(rows, columns, allowed)
    every = [(i, j) for i in range(1, rows + 1) for j in range(1, columns + 1) if i * j <= allowed]
    fullest = max(i * j for i, j in every)
    assert (r, c) in every
    assert r * c >= 0.9 * fullest
    aspect = math.log(rows / columns)
    best = min(abs(math.log(i / j) - aspect) for i, j in every if i * j >= 0.9 * fullest)
    assert abs(math.log(r / c) - aspect) == pytest.approx(best)


@pytest.mark.parametrize("size", [(420, 308), (301, 423), (560, 112)])
def test_the_processor_makes_as_many_tokens_as_allowed(size: tuple[int, int]) -> None:
    processor, share = build_processor(), make_method("downsample").pixel_share(0.5)
    assert share == 0.5

    def tokens(image: Image.Image) -> int:
        return int(processor.image_processor(images=[image])["image_grid_thw"][0].prod()) // 4

    image = Image.new("RGB", size)
    small = shrink(image, adapter("qwen2_5_vl"), processor, share)
    whole = tokens(image)
    assert 0.85 * 0.5 * whole <= tokens(small) <= budget(0.5, whole)
    assert small.width * small.height < image.width * image.height


def test_nothing_is_shrunk_to_where_the_processor_enlarges_it_again() -> None:
    processor = build_processor()
    processor.image_processor.size = {"shortest_edge": 12 * 28 * 28, "longest_edge": 64 * 28 * 28}
    small = shrink(Image.new("RGB", (140, 112)), adapter("qwen2_5_vl"), processor, 0.5)
    assert small.size == (112, 84), "12 tokens are the fewest"
    assert processor.image_processor(images=[small])["image_grid_thw"].tolist() == [[1, 6, 8]]


@functools.cache
def tiled_processor(family: str, folder: Path) -> Any:
    """The real processor at a published geometry (InternVL: smaller tiles), on a small tokenizer."""
    if family == "deepseek_vl2":
        deepseek_vl2_tokenizer.write(folder, [[384 * w, 384 * h] for w in range(1, 10) for h in range(1, 10 // w)])
        return DeepseekVL2Processor.from_pretrained(folder)
    tokenizer: Any = build_processor().tokenizer
    special = {
        "image_token": "<image>",
        "video_token": "<video>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<image>",
    }
    tokenizer.add_tokens(sorted(set(special.values())), special_tokens=True)
    for name, token in special.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    if family == "internvl":
        tiles = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, max_patches=6)
        return InternVLProcessor(tiles, tokenizer, InternVLVideoProcessor(), image_seq_length=4)
    if family == "llava_next":
        square = {"height": 336, "width": 336}
        views = LlavaNextImageProcessor(size={"shortest_edge": 336}, crop_size=square)
        return LlavaNextProcessor(views, tokenizer, 14, "default", num_additional_image_tokens=1)
    pinpoints = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    views = LlavaOnevisionImageProcessor(size={"height": 384, "width": 384}, image_grid_pinpoints=pinpoints)
    return LlavaOnevisionProcessor(views, tokenizer, LlavaOnevisionVideoProcessor(), 729, "full")


def encoded(processor: Any, image: Image.Image) -> int:
    """Visual tokens of an image, encoded with a text as for the model."""
    if isinstance(processor, DeepseekVL2Processor):
        inputs = processor([[{"role": "user", "content": "<image>a"}]], [[image]])
        return int((inputs["input_ids"] == processor.image_token_id).sum())
    inputs = processor(text=["<image>a"], images=[image], return_tensors="pt")
    return int((inputs["input_ids"] == processor.tokenizer.image_token_id).sum())


@pytest.mark.parametrize(
    ("family", "size", "share", "spends"),
    [
        ("llava_next", (640, 480), 0.75, 576 + 24 * 33),  # 672 x 672 becomes 672 x 336, as high as a tile
        ("llava_next", (300, 900), 0.6, 576 + 48 * 17),  # 336 x 1008 -> 336 x 672
        ("llava_onevision", (640, 480), 0.75, 729 + 27 * 37),
        ("llava_onevision", (2000, 1500), 0.25, 729 + 27 * 37),
        ("deepseek_vl2", (768, 384), 0.8, 14 * 15 + 1 + 14 * 15),
    ],
)
def test_tiled_families(
    family: str, size: tuple[int, int], share: float, spends: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    processor = tiled_processor(family, tmp_path_factory.getbasetemp() / "deepseek_vl2")
    image = Image.new("RGB", size)
    small = shrink(image, adapter(family), processor, share)
    assert encoded(processor, small) == spends <= budget(share, encoded(processor, image))
    assert small.width * small.height < image.width * image.height
    assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.021)


@pytest.mark.parametrize(
    ("size", "share", "grid"),
    [
        ((640, 480), 0.75, (2, 2)),  # from 3 x 2 tiles and a thumbnail
        ((640, 480), 0.5, (2, 1)),
        ((480, 640), 0.5, (1, 2)),
        ((640, 480), 0.3, (1, 1)),
        ((640, 480), 0.1, (1, 1)),  # still 1/7
        ((200, 200), 0.5, (1, 1)),  # from 2 x 2 and a thumbnail; 2 x 1 resolve no side better
        ((1000, 200), 0.75, (3, 1)),  # from 5 x 1 and a thumbnail
        ((1280, 720), 1.0, None),
        ((28, 28), 0.5, None),
    ],
)
def test_internvl_gets_fewer_tiles(size: tuple[int, int], share: float, grid: tuple[int, int] | None) -> None:
    processor = tiled_processor("internvl", Path())
    image = Image.new("RGB", size)
    small = shrink(image, adapter("internvl"), processor, share)
    assert small.size == ((grid[0] * 28, grid[1] * 28) if grid else size)
    tiles = (grid[0] * grid[1]) if grid else None
    assert tiles is None or encoded(processor, small) == 4 * (tiles + (tiles > 1)), "the grid that was meant"
    assert encoded(processor, small) <= max(4, budget(share, encoded(processor, image)))


def test_what_a_tiling_cannot_reach_is_had_for_the_least() -> None:
    def count(sizes: list[tuple[int, int]]) -> list[int]:
        return [100 if width > 300 else 40 for width, _ in sizes]

    assert shrunk_to_count(count, (600, 400), 0.5) == (296, 197), "the largest of those that cost as much"
    assert shrunk_to_count(count, (600, 400), 1) == (600, 400)
    assert shrunk_to_count(count, (600, 400), 0.3) == (296, 197)
    assert shrunk_to_count(lambda sizes: [3] * len(sizes), (5, 7), 1) == (5, 7)


def test_fixed_resolution_is_unsupported() -> None:
    model, _ = tiny_models.build("llava")
    with pytest.raises(Unsupported, match="same number of visual tokens"), ivcp_eval.prune(model, "downsample", 0.5):
        pass
    with ivcp_eval.prune(model, "downsample", 1.0):
        pass


def test_fixed_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match="same number of visual tokens"):
        shrink(Image.new("RGB", (64, 64)), adapter("llava"), None, 0.5)


def test_a_session_notes_images_that_stay_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """As several images of a LLaVA-OneVision sample do, whatever their size."""
    weights = locate("tiny")
    session = Session(weights, Placement(device="cpu").resolve(), Limits(28 * 28, 200704, max_new_tokens=2))
    variant = Variant("tiny", "downsample", 0.5)
    parts = [{"image": Image.new("RGB", (112, 112))}, {"image": Image.new("RGB", (140, 84))}, {"text": "what is it?"}]
    answer = session.answer(parts, variant)
    assert (answer.visual_tokens, answer.visual_kept, answer.over_budget) == (16 + 15, 8 + 8, False)
    monkeypatch.setattr(type(session.adapter), "shrunk_size", lambda _self, _processor, size, _share: size)
    answer = session.answer(parts, variant)
    assert (answer.visual_tokens, answer.visual_kept, answer.over_budget) == (31, 31, True)
