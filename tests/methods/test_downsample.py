"""Oracle: the grid by brute force, and the number of tokens that the real image processor makes of the result."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from ivcp_eval.downsample import shrink, shrunk_grid
from ivcp_eval.ops import budget
from ivcp_eval.registry import adapter, make_method
from ivcp_eval.tiny.processor import build_processor


@pytest.mark.parametrize("share", [0.11, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 9), (12, 16), (40, 30), (1, 30)])
def test_grid(rows: int, columns: int, share: float) -> None:
    r, c = shrunk_grid(rows, columns, share)
    allowed = budget(share, rows * columns)
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


def test_fixed_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match="does not follow the size"):
        shrink(Image.new("RGB", (64, 64)), adapter("llava"), None, 0.5)
