"""The compressor against loops over patches and stock modules: what goes where, and where training begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model_adapters.qwen2_5_vl_uhd.modeling import Compressor, UhdV4Config, UhdV4VisionConfig, cells_of
from tests.engine import tiny_models

ROWS, COLUMNS, WIDTH = 8, 12, 32  # patches of a picture; 8 x 8 of them are a window


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tower(family: str) -> Any:
    model: Any = tiny_models.build(family)[0]
    return model.model.visual


def by_unit(raster: Tensor, side: int) -> Tensor:
    """(R, C, *) patches as a processor lists them: one unit of ``side`` x ``side`` after another, row by row."""
    rows, columns = raster.shape[:2]
    return torch.stack(
        [
            raster[row + r, column + c]
            for row in range(0, rows, side)
            for column in range(0, columns, side)
            for r in range(side)
            for c in range(side)
        ]
    )


def means(raster: Tensor) -> Tensor:
    """(R, C, *) -> (R / 2, C / 2, *)."""
    rows, columns = (n // 2 for n in raster.shape[:2])
    cells = [
        [raster[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten(0, 1).mean(0) for c in range(columns)]
        for r in range(rows)
    ]
    return torch.stack([torch.stack(row) for row in cells])


def test_cells_are_two_by_two_neighbours() -> None:
    numbers = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS)
    cells = cells_of(by_unit(numbers, 4))
    assert cells.shape == (ROWS * COLUMNS // 4, 4)
    wanted = [
        [numbers[r, c], numbers[r, c + 1], numbers[r + 1, c], numbers[r + 1, c + 1]]
        for r, c in [(4 * R + r, 4 * C + c) for R in range(2) for C in range(3) for r in (0, 2) for c in (0, 2)]
    ]
    assert cells.tolist() == [[int(n) for n in cell] for cell in wanted]


def test_an_untrained_compressor_averages() -> None:
    compressor, cells = Compressor(tower("qwen2_5_vl_uhd").config), drawn(6, 4, WIDTH)
    compressor.start(tower("qwen2_5_vl_uhd").blocks[0])
    result = compressor(cells, drawn(6, 4, 16, seed=1), drawn(6, 4, 16, seed=2))
    assert torch.equal(result, cells.mean(1))


def test_its_weights_are_a_blocks() -> None:
    """With scales of 1 it is the mean of what the stock block makes of 2 x 2 patches that see nothing else."""
    block, cells = tower("qwen2_5_vl_uhd").blocks[0], drawn(6, 4, WIDTH)
    angles = drawn(24, 8, seed=1).repeat(1, 2)
    compressor = Compressor(tower("qwen2_5_vl_uhd").config)
    compressor.start(block, scale=1.0)
    embeddings = angles.cos(), angles.sin()
    ends = torch.arange(0, 25, 4)
    alone = super(type(block), block).forward(cells.flatten(0, 1), cu_seqlens=ends, position_embeddings=embeddings)
    result = compressor(cells, *(part.unflatten(0, (6, 4)) for part in embeddings))
    torch.testing.assert_close(result, alone.unflatten(0, (6, 4)).mean(1), atol=1e-5, rtol=1e-5)


def test_an_untrained_tower_is_the_stock_one_with_a_mean_in_it() -> None:
    """Stock blocks before; then the mean of 2 x 2; then stock blocks on a picture half as wide, patches twice apart."""
    ours, pixels = tower("qwen2_5_vl_uhd"), drawn(ROWS, COLUMNS, 3 * 2 * 14**2)
    scales = ours.blocks[0].compressor.attention_scale, ours.blocks[0].compressor.mlp_scale
    kept = [scale.clone() for scale in scales]  # the tiny model's are drawn
    try:
        for scale in scales:
            scale.zero_()
        found = ours(by_unit(pixels, 4), grid_thw=torch.tensor([[1, ROWS, COLUMNS]])).pooler_output
    finally:
        for scale, value in zip(scales, kept, strict=True):
            scale.copy_(value)
    places = torch.stack(torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij"), -1).float()

    def block(number: int, states: Tensor, at: Tensor, window: int) -> Tensor:
        result = torch.empty_like(states)
        for left in range(0, states.shape[1], window):  # one row of windows
            seen = (slice(None), slice(left, left + window))
            angles = (at[seen].flatten(0, 1)[..., None] * ours.rotary_pos_emb.inv_freq).flatten(1).repeat(1, 2)
            inside = states[seen].flatten(0, 1)
            ends = torch.tensor([0, len(inside)])
            stock = super(type(ours.blocks[number]), ours.blocks[number]).forward
            mixed = stock(inside, cu_seqlens=ends, position_embeddings=(angles.cos(), angles.sin()))
            result[seen] = mixed.view(states[seen].shape)
        return result

    states = block(0, ours.patch_embed(pixels.flatten(0, 1)).view(ROWS, COLUMNS, -1), places, 8)
    states, places = means(states), means(places)
    states = block(1, states, places, 4)  # as many pixels as before
    states = block(2, states, places, COLUMNS)  # the one with full attention
    torch.testing.assert_close(found, ours.merger(by_unit(states, 2)), atol=1e-4, rtol=1e-4)


def test_sides_that_are_not_whole_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pictures of 8 x 6 patches cannot .* multiples of 4\. The model's own proc"):
        tower("qwen2_5_vl_uhd")(drawn(48, 3 * 2 * 14**2), grid_thw=torch.tensor([[1, 8, 6]]))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"compress_after": 3}, "compress_after 3 must leave .* 1 to 2"), ({"spatial_merge_size": 2}, "must be 4")],
)
def test_a_tower_that_cannot_be_is_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UhdV4VisionConfig(**{"depth": 3, "compress_after": 1, **change})


def test_a_picture_has_the_positions_of_the_stock_model() -> None:
    """Two tokens of text, 2 x 3 visual tokens, one of text, 1 x 1, one: each token at the first of the four before."""
    model: Any = tiny_models.build("qwen2_5_vl_uhd")[0]
    image = model.config.image_token_id
    ids = torch.tensor([[9, 9, *[image] * 6, 9, image, 9]])
    grids = torch.tensor([[1, 8, 12], [1, 4, 4]])
    positions, deltas = model.model.get_rope_index(ids, mm_token_type_ids=(ids == image).int(), image_grid_thw=grids)
    rows, columns = [2, 2, 2, 4, 4, 4], [2, 4, 6, 2, 4, 6]
    assert positions[:, 0].tolist() == [
        [0, 1, *[2] * 6, 8, 9, 11],
        [0, 1, *rows, 8, 9, 11],
        [0, 1, *columns, 8, 9, 11],
    ]
    assert deltas.tolist() == [[12 - 11]]


def test_a_configuration_is_written_and_read() -> None:
    config = tiny_models.build("qwen2_5_vl_uhd")[0].config
    assert UhdV4Config(**config.to_dict()).to_dict() == config.to_dict()  # type: ignore[union-attr,operator,arg-type]
