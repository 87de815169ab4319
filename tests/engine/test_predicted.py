"""Costs against hand counts from the papers, against a measured run, and solved ratios."""

from __future__ import annotations

import re

import pytest
import torch

import ivcp_eval
from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.engine.cost.measured import measured
from ivcp_eval.engine.cost.predicted import (
    Decoder,
    Prompt,
    cached,
    cost,
    described,
    misfit,
    processed,
    solve_budget,
    solve_ratio,
)
from ivcp_eval.interface import Cut, ModelFacts, models
from ivcp_eval.interface.registry import adapter, make_method
from ivcp_eval.interface.variants import CostTarget, Variant
from tests.engine import tiny_models

SEVEN_B = ModelFacts("qwen2_5_vl", 28)
THIRTY_TWO = ModelFacts("llava", 32)
SHAPE = DecoderShape(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, intermediate=18944)


def test_published_budgets() -> None:
    fastv = cost(make_method("fastv"), SEVEN_B, 0.5)
    assert fastv.layer_mean == pytest.approx((2 + 26 * 0.5) / 28)
    assert fastv.cached == fastv.layer_mean
    pyramid = cost(make_method("pyramiddrop"), THIRTY_TWO, 0.125)
    assert (pyramid.final, pyramid.layer_mean) == pytest.approx((0.125, (8 + 4 + 2 + 1) / 32))
    ivc = cost(make_method("ivc_prune"), SEVEN_B, 0.5)
    assert (ivc.final, ivc.layer_mean, ivc.cached) == pytest.approx((0.5, (16 + 12 * 0.5) / 28, 0.5))
    sparse = cost(make_method("sparsevlm"), THIRTY_TWO, 113 / 576)
    assert sparse.layer_mean * 576 == pytest.approx((3 * 576 + 4 * 309 + 9 * 204 + 16 * 113) / 32)


def test_cache_policies() -> None:
    cuts = (Cut(1, 0.8, cache="from_cut"), Cut(2, 0.5, cache="all_but_first"))
    assert processed(cuts, 4) == [1, 0.8, 0.5, 0.5]
    assert cached(cuts, 4) == [1, 0.5, 0.5, 0.5]
    assert cached((Cut(2, 0.5),), 4) == [0.5] * 4


def test_flops_are_those_of_the_formula() -> None:
    prompt = Prompt(SHAPE, n_visual=1000, n_text=60)

    def layer(n: int) -> int:  # multiply-adds: q, o; k, v; gate, up, down; scores and weighted values on n(n+1)/2 pairs
        return n * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 2 * (n * (n + 1) // 2) * 3584

    got = cost(make_method("fastv"), SEVEN_B, 0.5, prompt).flops
    assert got == pytest.approx((2 * layer(1060) + 26 * layer(560)) / (28 * layer(1060)))


@pytest.mark.parametrize("name", ["random", "downsample", "fastv", "pyramiddrop", "sparsevlm", "ivc_prune", "iwp"])
@pytest.mark.parametrize("kind", ["final", "layer_mean", "flops"])
def test_solved_ratio_hits_the_target(name: str, kind: str) -> None:
    prompt, method = Prompt(SHAPE, 1000, 60), make_method(name)
    for target in (0.7, 0.95):
        ratio = solve_ratio(method, SEVEN_B, target, kind, prompt)  # type: ignore[arg-type]
        assert getattr(cost(method, SEVEN_B, ratio, prompt), kind) == pytest.approx(target, abs=1e-3)


def test_targets_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 0\.571"):
        solve_ratio(make_method("ivc_prune"), SEVEN_B, 0.5, "layer_mean")
    with pytest.raises(ValueError, match="does not follow"):
        solve_ratio(make_method("rotatek"), SEVEN_B, 0.5, "final")
    with pytest.raises(ValueError, match="prompt"):
        solve_ratio(make_method("fastv"), SEVEN_B, 0.5, "flops")
    with pytest.raises(ValueError, match="layer_mean"):
        solve_ratio(make_method("fastv"), SEVEN_B, 0.5, "layers")  # type: ignore[arg-type]
    assert solve_ratio(make_method("rotatek"), SEVEN_B, 1.0, "final") == 1


def test_compressed_channels_count_as_bytes_only() -> None:
    got = cost(make_method("rotatek"), SEVEN_B, 0.25)
    assert (got.final, got.layer_mean, got.cached, got.cached_bytes) == (1, 1, 1, (1 + 0.25) / 2)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "ivc_prune", "sparsevlm", "divprune"])
def test_prediction_equals_measurement(name: str) -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with ivcp_eval.prune(model, name, 0.5) as run, torch.no_grad():
        model(**make_inputs("t5 i0 t9"))
    predicted = cost(make_method(name), adapter("qwen2_5_vl").facts(model.config, "qwen2_5_vl"), 0.5)
    one_token = 1 / run.visual_prompt[0]
    assert run.kept_ratio == pytest.approx(predicted.final, abs=one_token)
    assert run.layer_mean_ratio == pytest.approx(predicted.layer_mean, abs=one_token)
    assert run.cache_ratio == pytest.approx(predicted.cached, abs=one_token)


@pytest.mark.parametrize("parameters", [{}, {"first": 2}, {"attention": False}, {"mlp": False}], ids=str)
def test_prediction_of_what_masks_leave_out_equals_measurement(parameters: dict[str, int]) -> None:
    """FLOPs of a method that drops no token; its cubes are whole here, and the ratio above what they need."""
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    cubes = {"cube": (1, 2, 2), **parameters}
    with ivcp_eval.prune(model, "adaspark", 0.5, **cubes) as run, torch.no_grad():
        model(**make_inputs("t5 i0 t9"))
    n, shape = run.visual_prompt[0], DecoderShape.of(model.config)
    counts = [layer[0] for layer in run.visual_per_layer]
    pairs, mlp = [layer[0] for layer in run.visual_pairs], [layer[0] for layer in run.visual_mlp]
    found = measured(n, 14, counts, counts, shape, pairs, mlp)
    facts = adapter("qwen2_5_vl").facts(model.config, "qwen2_5_vl")
    predicted = cost(make_method("adaspark", cubes), facts, 0.5, Prompt(shape, n, 14))
    assert found.flops_analytic == pytest.approx(predicted.flops, abs=0.004)
    assert (predicted.final, predicted.layer_mean, predicted.cached, found.flops) == (1, 1, 1, 1)
    assert predicted.flops is not None
    assert predicted.flops < 0.99


def test_cubes_bound_what_masks_can_save() -> None:
    """Below the pairs of a cube and one token of each nothing can be held, and the refusal says so."""
    prompt, method = Prompt(SHAPE, 1024, 60), make_method("adaspark", {"cube": (2, 4, 4)})
    held = solve_ratio(method, SEVEN_B, 0.6, "flops", prompt)
    assert cost(method, SEVEN_B, held, prompt).flops == pytest.approx(0.6, abs=1e-6)
    lowest = cost(method, SEVEN_B, 1e-6, prompt).flops

    def layer(pairs: float, mlp: float) -> float:  # multiply-adds, as above
        return 1084 * (2 * 3584 * 3584 + 2 * 3584 * 512) + mlp * 3 * 3584 * 18944 + 2 * pairs * 3584

    text = 60 * 1024 + 60 * 61 / 2
    whole = layer(1024 * 1025 / 2 + text, 1084)
    assert lowest == pytest.approx(layer(32 * 32 * 33 / 2 + text, 32 + 60) / whole)
    with pytest.raises(ValueError, match=r"at least 0\.199 .*; 0\.1 needs other parameters"):
        solve_ratio(method, SEVEN_B, 0.1, "flops", prompt)


TINY = Decoder.of(models.locate("tiny"))


@pytest.mark.parametrize("kind", ["final", "layer_mean", "flops"])
@pytest.mark.parametrize("method", ["ivc_prune", "fastv", "pyramiddrop", "sparsevlm", "downsample"])
def test_a_held_variant_costs_what_was_asked(method: str, kind: str) -> None:
    variant = solve_budget(Variant("tiny", method, 0.7, {}, 3, CostTarget.of(kind, 0.7, (150, 30))), TINY)
    assert variant.budget is not None
    assert variant.budget.problem == ""
    assert (variant.requested, variant.seed) == (0.7, 3)
    prompt = Prompt(TINY.shape, 150, 30)
    assert getattr(cost(make_method(method), TINY.facts, variant.ratio, prompt), kind) == pytest.approx(0.7, abs=1e-9)
    assert f"ratio {variant.ratio:.4f}" in described(variant)


def test_a_budget_that_is_counted_and_not_saved_says_so() -> None:
    held = solve_budget(Variant("tiny", "adaspark", 0.7, budget=CostTarget.of("flops", 0.7)), TINY)
    assert held.budget is not None
    assert held.budget.problem == ""
    prompt = Prompt(TINY.shape, 1024, 64)
    assert cost(make_method("adaspark"), TINY.facts, held.ratio, prompt).flops == pytest.approx(0.7, abs=1e-9)
    assert described(held).endswith("(ratio_flops_analytic); here nothing is saved")


def test_parameters_decide_what_a_ratio_costs() -> None:
    early, late = (
        solve_budget(Variant("tiny", "ivc_prune", 0.7, {"layer": layer}, 0, CostTarget.of("layer_mean", 0.7)), TINY)
        for layer in (1, 4)
    )
    assert early.ratio == pytest.approx(1 - 0.3 * 6 / 5)
    assert late.ratio == pytest.approx(1 - 0.3 * 6 / 2)


@pytest.mark.parametrize(
    ("method", "parameters", "kind", "said"),
    [
        ("ivc_prune", {"layer": 4}, "layer_mean", "layer_mean: this method costs at least 0.667"),
        ("rotatek", {}, "flops", r"flops\(1024\+64\): this method's flops cost does not follow"),
        ("rotatek", {}, "flops", r"flops.* so none gives 0\.5; use budget own \(own: its own ratio\)"),
        ("adaspark", {"p": 0.5}, "flops", r"flops\(.*\(with these parameters\), so none gives 0\.5; use budget own"),
        ("adaspark", {}, "final", r"final: .* so none gives 0\.5; use budget own"),
        ("fastv", {"layer": 6}, "final", r"final: layer 6 is outside 0\.\.5"),
    ],
)
def test_a_budget_that_nothing_holds_says_why(method: str, parameters: dict[str, int], kind: str, said: str) -> None:
    variant = solve_budget(Variant("tiny", method, 0.5, parameters, 0, CostTarget.of(kind, 0.5)), TINY)
    assert variant.budget is not None
    assert re.match(said, variant.budget.problem)
    assert (variant.requested, variant.ratio) == (0.5, 0.5)
    assert re.match(said, misfit(variant, TINY.facts))


def test_without_a_budget_nothing_changes() -> None:
    variant = Variant("tiny", "fastv", 0.5)
    assert solve_budget(variant, TINY) is variant


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "ivc_prune", "sparsevlm", "divprune"])
def test_flops_of_a_measured_run_are_those_held(name: str) -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    facts, shape = adapter("qwen2_5_vl").facts(model.config, "qwen2_5_vl"), DecoderShape.of(model.config)
    inputs = make_inputs("t5 i0 t9")
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    prompt = Prompt(shape, visual, inputs["input_ids"].shape[1] - visual)
    ratio = solve_ratio(make_method(name), facts, 0.8, "flops", prompt)
    with ivcp_eval.prune(model, name, ratio) as run, torch.no_grad():
        model(**inputs)
    layers = [layer[0] for layer in run.visual_per_layer]
    text, cached = len(run.kept[0]) - run.visual_kept[0], [layer[0] for layer in run.visual_cached]
    shares = measured(visual, text, layers, cached, shape)
    one_less = measured(visual, prompt.n_text, [visual - 1] * shape.layers, cached, shape).flops
    assert one_less is not None
    assert shares.flops == pytest.approx(0.8, abs=1 - one_less)
    assert (shares.layer_mean, shares.cached) == pytest.approx((run.layer_mean_ratio, run.cache_ratio), abs=1e-4)


def test_ratio_for_a_model_in_a_notebook() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    ratio = ivcp_eval.ratio_for(model, "fastv", 0.7, "layer_mean", layer=1)
    with ivcp_eval.prune(model, "fastv", ratio, layer=1) as run, torch.no_grad():
        model(**make_inputs("t5 i0 t9"))
    assert run.layer_mean_ratio == pytest.approx(0.7, abs=1 / run.visual_prompt[0])
    assert ivcp_eval.ratio_for(model, "fastv", 0.7, "own") == 0.7
    with pytest.raises(ValueError, match="needs an earlier cut"):
        ivcp_eval.ratio_for(model, "fastv", 0.1, "flops", prompt=(100, 10))
