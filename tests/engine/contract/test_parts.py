"""The engine's parts and the shared tensor helpers, one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from ivcp_eval.engine.cache import PrunedLayer, SlotMap, gather_slots
from ivcp_eval.engine.geometry import Rows, attention_mask, take_position_embeddings, take_sequence
from ivcp_eval.engine.run import Run
from ivcp_eval.engine.signals.source import attention_rows, question_tokens, rotary_spectrum
from ivcp_eval.interface import Image, ImageSpan, ops


@given(st.floats(min_value=0, max_value=1, exclude_min=True), st.integers(1, 5000))
def test_budget(ratio: float, n: int) -> None:
    kept = ops.budget(ratio, n)
    assert 1 <= kept <= n
    assert kept == 1 or abs(kept - ratio * n) <= 0.5


def test_budget_rounds_half_to_even() -> None:
    assert [ops.budget(0.5, n) for n in (1, 3, 5, 7)] == [1, 2, 2, 4]
    assert ops.budget(1, 24) == 24
    assert ops.budget(0.0001, 24) == 1


def test_ranking_ties_fall_to_the_lower_index_and_nan_is_worst() -> None:
    nan, inf = float("nan"), float("inf")
    assert ops.ranking(torch.tensor([1.0, 2.0, 2.0, 1.0])).tolist() == [1, 2, 0, 3]
    assert ops.ranking(torch.tensor([nan, -5.0, inf, nan, 3.0])).tolist()[:3] == [2, 4, 1]
    assert sorted(ops.ranking(torch.tensor([nan, -inf, nan])).tolist()) == [0, 1, 2]
    assert ops.ranking(torch.zeros(1000)).tolist() == list(range(1000))
    assert ops.ranking(torch.tensor([1.0, 1.0 + 2**-20], dtype=torch.float64)).tolist() == [1, 0]
    assert ops.ranking(torch.tensor([1, 3, 2])).tolist() == [1, 2, 0]


def test_top_is_increasing_and_clipped() -> None:
    score = torch.tensor([0.1, 0.9, 0.5, 0.9])
    assert ops.top(score, 2).tolist() == [1, 3]
    assert ops.top(score, 9).tolist() == [0, 1, 2, 3]
    assert ops.top(score, 0).tolist() == ops.top(score, -1).tolist() == []


def test_top_of_each_image_keeps_each_budget() -> None:
    span = ImageSpan(torch.arange(2))
    images = [Image(torch.tensor([0, 1]), 1, 2, span), Image(torch.tensor([2, 3, 4]), 2, 3, span)]
    assert ops.top_of_each_image(torch.tensor([0.0, -1.0, 9.0, 9.0, 9.0]), images).tolist() == [0, 2, 3]


def test_rows_are_padded_on_the_left() -> None:
    rows = Rows((torch.tensor([2, 3, 5]), torch.tensor([1])))
    assert rows.length == 3
    assert rows.padded
    assert rows.matrix().tolist() == [[2, 3, 5], [-1, -1, 1]]
    earlier = torch.tensor([[1, 2, 3, 4, 5], [-1, -1, 0, 1, 9]])
    assert rows.slots_in(earlier).tolist() == [[1, 2, 4], [-1, -1, 3]]
    assert not Rows((torch.tensor([1]), torch.tensor([4]))).padded
    assert Rows(()).length == 0


def test_take_sequence_expands_a_shared_batch_axis() -> None:
    states = torch.arange(5.0)[None, :, None]
    slots = torch.tensor([[1, 3], [-1, 4]])
    assert take_sequence(states, slots)[..., 0].tolist() == [[1, 3], [0, 4]]
    three_axes = torch.stack([states, states + 10])
    assert take_sequence(three_axes, slots)[1, ..., 0].tolist() == [[11, 13], [10, 14]]
    cos, sin = take_position_embeddings((states, -states), slots)
    assert cos[..., 0].tolist() == [[1, 3], [0, 4]]
    assert sin[..., 0].tolist() == [[-1, -3], [0, -4]]
    complex_states = torch.polar(torch.ones(1, 5, 1), torch.arange(5.0)[None, :, None])
    assert torch.equal(take_position_embeddings(complex_states, slots)[0, :, 0], complex_states[0, [1, 3], 0])


COLUMNS = torch.tensor([[0, 2, 5, 6], [-1, -1, 1, 6]])


def test_mask_for_flash_is_two_dimensional() -> None:
    for name in ("flash_attention_2", "flash_attention_3"):
        mask = attention_mask(COLUMNS, 2, implementation=name, dtype=torch.float32)
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[True] * 4, [False, False, True, True]]
    allowed = torch.tensor([[True, False, True, True], [True, True, True, False]])
    mask = attention_mask(COLUMNS, 2, implementation="flash_attention_2", dtype=torch.float32, allowed=allowed)
    assert mask.tolist() == [[True, False, True, True], [False, False, True, False]]


def test_mask_for_sdpa_and_eager() -> None:
    mask = attention_mask(COLUMNS, 2, implementation="sdpa", dtype=torch.float32)
    assert mask.shape == (2, 1, 2, 4)
    assert mask[:, 0].int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 0, 1, 0], [0, 0, 1, 1]]]
    for dtype in (torch.float32, torch.bfloat16):
        additive = attention_mask(COLUMNS, 2, implementation="eager", dtype=dtype)
        assert additive.dtype == dtype
        assert torch.equal(additive == 0, mask)
        assert bool((additive[~mask] == torch.finfo(dtype).min).all())


def test_a_padding_query_sees_itself_only() -> None:
    mask = attention_mask(torch.tensor([[-1, -1, 4]]), 3, implementation="sdpa", dtype=torch.float32)
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def pruned_layer() -> PrunedLayer:
    """Two rows of a prompt of 6 columns; the second row has one padding slot."""
    layer = DynamicLayer()
    states = torch.arange(6.0)[None, None, :, None].expand(2, 1, 6, 2) + torch.tensor([0.0, 100.0])[:, None, None, None]
    layer.masked = True  # as a prune block says
    layer.update(states, -states)
    columns = torch.tensor([[0, 3, 5], [-1, 4, 5]])
    gather_slots(layer, columns)
    return PrunedLayer(layer, SlotMap(columns, 6, padded=True, shift=torch.tensor([[3], [4]])))


def test_pruned_layer_is_short_and_counts_long() -> None:
    layer = pruned_layer()
    assert layer.keys[:, 0, :, 0].tolist() == [[0, 3, 5], [100, 104, 105]]
    assert layer.values[1, 0, :, 0].tolist() == [-100, -104, -105]
    assert (layer.get_seq_length(), layer.dropped) == (6, 3)
    assert layer.get_mask_sizes(2) == (5, 3)
    layer.masked = True  # as a prune block says
    layer.update(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))
    assert (layer.get_seq_length(), layer.keys.shape[-2]) == (8, 5)
    assert layer.slot_map.key_columns(5).tolist() == [[0, 3, 5, 6, 7], [-1, 4, 5, 6, 7]]


@pytest.mark.parametrize(("argument", "left"), [(-1, 4), (-2, 3), (0, 5), (7, 4), (6, 3), (9, 5)])
def test_crop_relative_and_absolute(argument: int, left: int) -> None:
    layer = pruned_layer()
    layer.masked = True  # as a prune block says
    layer.update(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))
    layer.crop(argument)
    assert layer.keys.shape[-2] == layer.values.shape[-2] == left


def test_rows_of_a_pruned_layer_move_with_their_record() -> None:
    layer = pruned_layer()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.slot_map.columns.tolist() == [[-1, 4, 5], [-1, 4, 5]]
    assert layer.slot_map.shift is not None
    assert layer.slot_map.shift.tolist() == [[4], [4]]
    assert layer.keys[0, 0, :, 0].tolist() == [100, 104, 105]
    layer = pruned_layer()
    layer.batch_repeat_interleave(2)
    assert layer.slot_map.columns[:, 0].tolist() == [0, 0, -1, -1]
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert layer.slot_map.columns[:, 0].tolist() == [-1, 0]
    assert layer.keys.shape[0] == 2


def test_question_tokens() -> None:
    columns = torch.tensor([0, 1, 4, 5, 6, 7, 8])
    visual, text = torch.tensor([2, 3]), torch.tensor([0, 1, 4, 5, 6])
    assert question_tokens(columns, visual, text, 0).tolist() == [4, 5, 6]
    assert question_tokens(columns, visual, text, 1).tolist() == [5, 6]
    assert question_tokens(columns, visual, torch.tensor([0, 1]), 1).tolist() == [0, 1]


def test_attention_rows_is_causal_grouped_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads, 7, 4, generator=generator) for heads in (4, 2))
    rows = torch.tensor([0, 3, 6])
    got = attention_rows(query, key, rows, 0.5)
    logits = query @ key.repeat_interleave(2, dim=0).transpose(1, 2) * 0.5
    logits = logits.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(got, logits.softmax(-1)[:, rows])
    for stretch in (range(7), range(3, 5), range(6, 7)):
        got = attention_rows(query, key, stretch, 0.5)
        torch.testing.assert_close(got, logits.softmax(-1)[:, stretch.start : stretch.stop, : stretch.stop])


def test_rotary_spectrum_is_float32_of_large_positions() -> None:
    frequencies = (1 / 10000 ** (torch.arange(4) / 4)).bfloat16()
    cos, sin = rotary_spectrum(frequencies, torch.tensor([[0, 16383]]))
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0, 0].tolist() == [1.0] * 8
    torch.testing.assert_close(cos[0, 1, :4], (16383 * frequencies.float()).cos())


def test_run_shares() -> None:
    run = Run("m", 0.5, visual_prompt=[10, 30], visual_kept=[5, 15], visual_per_layer=[[10, 30], [5, 15]])
    run.visual_cached = [[5, 15], [5, 15]]
    assert (run.kept_ratio, run.layer_mean_ratio, run.cache_ratio) == (0.5, 0.75, 0.5)
    empty = Run("m", 0.5)
    assert empty.kept_ratio != empty.kept_ratio  # no visual token, no share
