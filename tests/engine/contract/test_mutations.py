"""The contract can fail: each mutant of the engine, one plausible bug, is caught by the checks that name it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import ivcp_eval.engine
from ivcp_eval.engine import geometry, prefill
from ivcp_eval.engine.cache import PrunedLayer, SlotMap
from ivcp_eval.engine.decoding import continuation
from ivcp_eval.engine.decoding.drafts import Drafts
from ivcp_eval.engine.hooks import Engine
from ivcp_eval.engine.prefill import Cutter, Prefill
from ivcp_eval.engine.signals import source as signals
from ivcp_eval.engine.signals import vision
from ivcp_eval.interface import ops
from model_adapters import qwen2_5_vl
from tests.engine.contract import test_videos
from tests.engine.contract.cases import Case
from tests.engine.contract.checks import CHECKS

Mutant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, tuple[Mutant, tuple[tuple[str, str], ...]]] = {}
VIDEO_MUTANTS: dict[str, tuple[Mutant, Callable[[str], None]]] = {}


def caught_by(*checks: tuple[str, str]) -> Callable[[Mutant], Mutant]:
    """Register a mutant with the (check, method) pairs that must fail on it."""

    def register(mutant: Mutant) -> Mutant:
        MUTANTS[mutant.__name__] = (mutant, checks)
        return mutant

    return register


def caught_on_videos_by(test: Callable[[str], None]) -> Callable[[Mutant], Mutant]:
    """Register a mutant with the test of a family's videos that must fail on it."""

    def register(mutant: Mutant) -> Mutant:
        VIDEO_MUTANTS[mutant.__name__] = (mutant, test)
        return mutant

    return register


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``change(original, *args)``."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


@caught_by(("prefill_equals_reference", "toy_all_layers"), ("decode_equals_reference", "ivc_prune"))
def survivors_are_renumbered(patch: pytest.MonkeyPatch) -> None:
    def cut(original: Any, self: Cutter, state: Any, cut: Any, *rest: Any) -> Any:
        return original(self, state, replace(cut, renumber=True), *rest)

    wrap(patch, Cutter, "cut", cut)


@caught_by(("prefill_equals_reference", "toy_renumber"), ("decode_equals_reference", "toy_renumber"))
def renumbering_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def cut(original: Any, self: Cutter, state: Any, cut: Any, *rest: Any) -> Any:
        return original(self, state, replace(cut, renumber=False), *rest)

    wrap(patch, Cutter, "cut", cut)


@caught_by(("decode_equals_reference", "toy_renumber"), ("second_turn_equals_reference", "toy_renumber_from_cut"))
def decoding_forgets_the_renumbering(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        prefill,
        "SlotMap",
        lambda original, columns, length, padded, shift=None: original(columns, length, padded),
    )


@caught_by(("decode_equals_reference", "toy_renumber_once"))
def a_later_cut_forgets_the_renumbering(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, prefill, "LayerSlots", lambda original, rows, matrix, shift=None: original(rows, matrix))


@caught_by(
    ("decode_equals_reference", "toy_all_layers"),
    ("cache_lengths_are_as_declared", "toy_all_layers"),
    ("earlier_caches_hold_the_survivors", "ivc_prune"),
)
def earlier_caches_are_not_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Prefill, "cut_caches", lambda self, cut, device: None)


@caught_by(("cache_lengths_are_as_declared", "toy_from_cut"), ("decode_equals_reference", "toy_from_cut"))
def the_cache_policy_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def cut_caches(original: Any, self: Prefill, cut: Any, device: Any) -> None:
        original(self, replace(cut, cache="all_layers"), device)

    wrap(patch, Prefill, "cut_caches", cut_caches)


@caught_by(("cache_lengths_are_as_declared", "snapkv"), ("decode_equals_reference", "snapkv"))
def nothing_is_evicted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Prefill, "evict", lambda self, layer, kept: None)


@caught_by(("earlier_caches_hold_the_survivors", "snapkv"), ("decode_equals_reference", "snapkv"))
def every_head_keeps_what_the_first_does(patch: pytest.MonkeyPatch) -> None:
    def evict(original: Any, self: Prefill, layer: int, kept: Any) -> None:
        original(self, layer, [indices[:1] for indices in kept])

    wrap(patch, Prefill, "evict", evict)


@caught_by(("decode_equals_reference", "toy_all_layers"), ("earlier_caches_hold_the_survivors", "toy_all_layers"))
def earlier_caches_keep_the_wrong_slots(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, prefill, "gather_slots", lambda original, layer, slots: original(layer, (slots - 1).clamp_min(0)))


@caught_by(("prefill_equals_reference", "toy_all_layers"), ("decode_equals_reference", "toy_stages_mixed"))
def embeddings_are_taken_one_off(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, prefill, "take_position_embeddings", lambda original, parts, slots: original(parts, slots - 1))


@caught_by(("prefill_equals_reference", "toy_all_layers"), ("batch_equals_its_rows", "toy_all_layers"))
def padding_is_visible(patch: pytest.MonkeyPatch) -> None:
    def mask(original: Any, key_columns: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(key_columns.clamp_min(0), *args, **kwargs)

    for module in (prefill, continuation):
        wrap(patch, module, "attention_mask", mask)


@caught_by(("prefill_equals_reference", "toy_all_layers"), ("eager_equals_sdpa", "toy_all_layers"))
def the_mask_is_not_causal(patch: pytest.MonkeyPatch) -> None:
    def mask(original: Any, key_columns: torch.Tensor, query_length: int, **kwargs: Any) -> Any:
        wide = original(key_columns, query_length, **kwargs)
        last = wide[:, :, -1:].expand_as(wide)
        return last.clone()

    for module in (prefill, continuation):
        wrap(patch, module, "attention_mask", mask)


@caught_by(("decode_equals_reference", "toy_all_layers"), ("beams_equal_reference", "toy_stages_mixed"))
def continuations_get_the_stock_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "_continue_layer", lambda self, state, index, hidden, kwargs: kwargs)


@caught_by(("cache_lengths_are_as_declared", "toy_all_layers"), ("manual_decoding_equals_reference", "ivc_prune"))
def logical_length_is_physical(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrunedLayer, "get_seq_length", lambda self: self.keys.shape[-2])


@caught_by(("beams_equal_reference", "toy_all_layers"))
def beams_do_not_reorder_the_slot_map(patch: pytest.MonkeyPatch) -> None:
    """Rows of a beam share their slots, so the map of another *row* is handed out instead."""
    wrap(patch, SlotMap, "rows", lambda original, self, indices: original(self, indices.flip(0)))


@caught_by(("prefill_equals_reference", "toy_draw"), ("decode_equals_reference", "toy_draw"))
def other_tokens_survive_than_chosen(patch: pytest.MonkeyPatch) -> None:
    def survivors(original: Any, self: Cutter, state: Any, chosen: Any, found: Any) -> Any:
        columns, *rest = original(self, state, chosen, found)
        pairs = zip(state.now.rows.columns, columns, strict=True)
        return [alive[torch.isin(alive, kept).roll(1)] for alive, kept in pairs], *rest

    wrap(patch, Cutter, "_survivors", survivors)


@caught_by(("prefill_equals_reference", "toy_all_layers"), ("decode_equals_reference", "toy_all_layers"))
def survivors_are_out_of_order(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, prefill, "Rows", lambda original, columns: original(tuple(row.flip(0) for row in columns)))


@caught_by(("budget_is_exact_per_image", "toy_all_layers"), ("budget_is_exact_per_image", "ivc_prune"))
def the_budget_is_off_by_one(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, ops, "budget", lambda original, ratio, n: max(1, original(ratio, n) - 1))


@caught_by(("budget_is_exact_per_image", "toy_all_layers"), ("budget_is_exact_per_image", "ivc_prune"))
def the_budget_is_rounded_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ops, "budget", lambda ratio, n: max(1, int(ratio * n)))


@caught_by(("budget_is_exact_per_image", "toy_all_layers"))
def images_share_one_budget(patch: pytest.MonkeyPatch) -> None:
    def pooled(score: torch.Tensor, images: Any) -> torch.Tensor:
        return ops.top(score, sum(image.budget for image in images))

    patch.setattr(ops, "top_of_each_image", pooled)


@caught_by(("budget_is_exact_per_image", "toy_stages_all_layers"))
def ratios_of_stages_compound(patch: pytest.MonkeyPatch) -> None:
    def images(original: Any, spans: Any, visual_columns: torch.Tensor, ratio: float, *rest: Any) -> Any:
        made = original(spans, visual_columns, ratio, *rest)
        return tuple(replace(image, budget=ops.budget(ratio, image.tokens.numel())) for image in made)

    wrap(patch, signals, "images_at_cut", images)


@caught_by(("nothing_is_left_behind", "toy_all_layers"), ("nothing_is_left_behind", "ivc_prune"))
def hooks_are_left_behind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "detach", lambda self: None)


@caught_by(("nothing_is_left_behind", "toy_all_layers"))
def a_failed_forward_leaves_its_state(patch: pytest.MonkeyPatch) -> None:
    """The forward after a failure starts in the middle of the failed one."""
    begin = Engine._before_text_model

    def before(self: Engine, *args: Any) -> None:
        stale = self._running
        begin(self, *args)
        self._running = stale or self._running

    patch.setattr(Engine, "_before_text_model", before)
    patch.setattr(Engine, "_after_text_model", _after_without_cleaning)


_after = Engine._after_text_model


def _after_without_cleaning(self: Engine, module: Any, args: Any, kwargs: Any, output: Any) -> None:
    if output is not None:
        _after(self, module, args, kwargs, output)


@caught_by(("repeatable", "toy_draw"), ("batch_equals_its_rows", "toy_draw"))
def rows_draw_from_the_global_generator(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cutter, "_row_seed", lambda self, state, row, alive: int(torch.randint(1 << 30, ())))


@caught_by(("batch_equals_its_rows", "toy_draw"))
def rows_draw_by_their_place_in_the_batch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cutter, "_row_seed", lambda self, state, row, alive: row)


@caught_by(("repeatable", "toy_draw"), ("repeatable", "random"))
def every_row_draws_alike(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cutter, "_row_seed", lambda self, state, row, alive: self.parts.seed)


@caught_by(("prefill_equals_reference", "toy_merge"))
def merging_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def survivors(original: Any, self: Cutter, state: Any, chosen: Any, found: Any) -> Any:
        columns, _merged, targets = original(self, state, chosen, found)
        return columns, chosen.hidden, targets

    wrap(patch, Cutter, "_survivors", survivors)


@caught_by(("ratio_one_is_bit_equal", "toy_merge"), ("ratio_one_is_bit_equal", "toy_renumber"))
def ratio_one_still_cuts(patch: pytest.MonkeyPatch) -> None:
    def resolve(original: Any, model: Any, method: Any, ratio: float, *rest: Any) -> Any:
        resolved = original(model, method, min(ratio, 0.999), *rest)
        return resolved

    wrap(patch, ivcp_eval.engine, "resolve", resolve)


@caught_by(("prompt_lookup_equals_greedy", "toy_all_layers"), ("prompt_lookup_equals_greedy", "ivc_prune"))
def drafts_are_pruned_with_the_prompt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Drafts, "attach", lambda self: [])


@caught_by(("question_before_image_equals_reference", "toy_all_layers"), ("decode_equals_reference", "toy_all_layers"))
def text_may_be_dropped(patch: pytest.MonkeyPatch) -> None:
    def survivors(original: Any, self: Cutter, state: Any, chosen: Any, found: Any) -> Any:
        columns, *rest = original(self, state, chosen, found)
        return [kept[kept != alive[0]] for alive, kept in zip(state.now.rows.columns, columns, strict=True)], *rest

    wrap(patch, Cutter, "_survivors", survivors)


@caught_by(("eager_equals_sdpa", "toy_all_layers"))
def eager_gets_no_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cutter, "_prefill_mask", lambda self, state, hidden: None)


@caught_by(("half_precision_runs", "toy_all_layers"))
def caches_become_float32(patch: pytest.MonkeyPatch) -> None:
    def pruned(layer: Any, slot_map: Any) -> PrunedLayer:
        made = PrunedLayer(layer, slot_map)
        made.keys, made.values = made.keys.float(), made.values.float()
        return made

    patch.setattr(prefill, "PrunedLayer", pruned)


@caught_by(("second_turn_equals_reference", "toy_all_layers"), ("batch_equals_its_rows", "toy_all_layers"))
def padding_slots_are_recorded_as_columns(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, geometry.Rows, "matrix", lambda original, self: original(self).clamp_min(0))


@caught_on_videos_by(lambda family: test_videos.test_signals_of_the_tower_follow_the_prompt(family, "forward"))
def signals_of_videos_follow_those_of_images(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vision, "_places", lambda in_video: torch.arange(in_video.numel()))


@caught_on_videos_by(lambda family: test_videos.test_a_span_knows_its_clip_frame_and_second(family, "generate"))
def a_step_is_shown_a_second_late(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, qwen2_5_vl, "Frame", lambda original, clip, index, at: original(clip, index, at and at + 1))


@caught_on_videos_by(lambda family: test_videos.test_a_span_knows_its_clip_frame_and_second(family, "forward"))
def videos_are_found_behind_all_pictures(patch: pytest.MonkeyPatch) -> None:
    def in_order(*found: Any) -> Any:
        return [[span for spans in row for span in spans] for row in zip(*found, strict=True)]

    patch.setattr(qwen2_5_vl, "in_prompt_order", in_order)


@caught_on_videos_by(lambda family: CHECKS["budget_is_exact_per_image"](Case(family, "toy_clips", videos=True)))
def the_budget_of_a_clip_is_that_of_its_frames(patch: pytest.MonkeyPatch) -> None:
    def images(original: Any, spans: Any, visual_columns: torch.Tensor, ratio: float, *_rest: Any) -> Any:
        return original(spans, visual_columns, ratio, "image")

    wrap(patch, signals, "images_at_cut", images)


@pytest.fixture
def shared_models() -> Iterator[None]:
    """A mutant may leave hooks on the models that all tests share."""
    case = Case("qwen2_5_vl", "none")
    case.forward(case.inputs("t3 i2 t3"))  # stock modules register hooks of their own in their first forward
    with case.but(method="toy_all_layers").prune():
        pass  # the self-test passes before the mutant comes: the checks must catch it
    before = [(kind, set(kind)) for kind in _hook_tables(case)]
    yield
    for kind, known in before:
        for key in set(kind) - known:
            del kind[key]


def _hook_tables(case: Case) -> list[dict[Any, Any]]:
    modules = [module for attn in ("sdpa", "eager") for module in case.but(attn=attn).model.modules()]
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    models = [vars(case.but(attn=attn).model) for attn in ("sdpa", "eager")]  # `generate` is hidden inside a block
    return [*models, *(getattr(module, kind) for module in modules for kind in kinds)]


@pytest.mark.usefixtures("shared_models")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, checks = MUTANTS[name]
    with monkeypatch.context() as patch:
        mutant(patch)
        for check, method in checks:
            # A TypeError would be a broken mutant.
            with pytest.raises((AssertionError, ValueError, RuntimeError)):
                CHECKS[check](Case("qwen2_5_vl", method))


@pytest.mark.usefixtures("shared_models")
@pytest.mark.parametrize("name", VIDEO_MUTANTS)
def test_mutant_is_caught_on_videos(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes without it: the tests themselves run on every family."""
    mutant, test = VIDEO_MUTANTS[name]
    with monkeypatch.context() as patch:
        mutant(patch)
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            test("qwen2_5_vl")


def test_the_checks_pass_without_a_mutant() -> None:
    """Otherwise every mutant would be caught."""
    for check, method in sorted({pair for _, pairs in MUTANTS.values() for pair in pairs}):
        CHECKS[check](Case("qwen2_5_vl", method))
