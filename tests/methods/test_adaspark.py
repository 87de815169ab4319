"""Oracle: cubes and top-p with Python loops; what is left out is counted, and refused where it cannot be."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.engine.cost.measured import measured
from ivcp_eval.interface import Cut, Processed, Signals, Unsupported
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import GROUPS, HEADS, SIZE, random_clips, random_signals

CLIPS = ((3, 4, 6), (0, 3, 4))
SIDES = (2, 2, 3)


def slow_cubes(clips: tuple[tuple[int, int, int], ...], sides: tuple[int, int, int]) -> list[int]:
    """The cube of every token, numbered as they come by frames, rows, columns."""
    names: list[tuple[int, ...]] = []
    for clip, (frames, rows, columns) in enumerate(clips):
        for frame in range(max(1, frames)):
            for row in range(rows):
                for column in range(columns):
                    names.append((clip, frame // sides[0], row // sides[1], column // sides[2]))
    order = sorted(set(names))
    return [order.index(name) for name in names]


def slow_chance(signals: Signals, cube: list[int], rotated: bool) -> list[list[list[float]]]:
    """[head][query][cube] softmax over the cubes before the query's own."""
    assert signals.project is not None
    assert signals.rotate is not None
    query, key = signals.project("query"), signals.project("key")
    if rotated:
        query, key = signals.rotate(query), signals.rotate(key)
    query, key = (states[:, signals.visual].double() for states in (query, key))
    found = []
    for head in range(HEADS):
        own_key = key[head * GROUPS // HEADS]
        means = [own_key[[i for i, c in enumerate(cube) if c == name]].mean(0) for name in range(max(cube) + 1)]
        rows = []
        for i, name in enumerate(cube):
            powers = [math.exp(float(query[head, i] @ mean) / math.sqrt(SIZE)) for mean in means[:name]]
            rows.append([power / sum(powers) for power in powers])
        found.append(rows)
    return found


def slow_top_p(chance: list[float], p: float) -> set[int]:
    """The largest until they hold p."""
    taken, mass = set(), 0.0
    for name in sorted(range(len(chance)), key=lambda c: (-chance[c], c)):
        if mass >= p:
            break
        taken.add(name)
        mass += chance[name]
    return taken


def layer_of(signals: Signals, ratio: float, layer: int = 0) -> Signals:
    return replace(signals, cut=Cut(layer, ratio))


@pytest.mark.parametrize("p", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("rotated", [True, False])
def test_attention_by_p(p: float, rotated: bool) -> None:
    signals = layer_of(random_clips(*CLIPS), 0.5)
    cube = slow_cubes(CLIPS, SIDES)
    seen = make_method("adaspark", {"p": p, "cube": SIDES, "rotated": rotated}).attended_pairs(signals)
    assert seen is not None
    chance = slow_chance(signals, cube, rotated)
    wanted = [
        [[c == name or c in slow_top_p(row, p) for c in cube] for row, name in zip(rows, cube, strict=True)]
        for rows in chance
    ]
    assert seen.tolist() == wanted
    earlier = torch.tensor(cube)[:, None] > torch.tensor(cube)
    assert bool(seen[:, earlier].all()) == (p == 1)


@pytest.mark.parametrize("heads", ["each", "mean"])
@pytest.mark.parametrize("queries", ["token", "cube"])
def test_who_chooses(heads: str, queries: str) -> None:
    signals = layer_of(random_clips(*CLIPS), 0.5)
    cube = slow_cubes(CLIPS, SIDES)
    seen = make_method("adaspark", {"p": 0.4, "cube": SIDES, "heads": heads, "queries": queries}).attended_pairs(
        signals
    )
    assert seen is not None
    chance = torch.zeros(HEADS, len(cube), max(cube) + 1, dtype=torch.float64)
    for head, rows in enumerate(slow_chance(signals, cube, True)):
        for i, row in enumerate(rows):
            chance[head, i, : len(row)] = torch.tensor(row)
    if heads == "mean":
        chance = chance.mean(0, keepdim=True)
    if queries == "cube":
        chance = torch.stack([chance[:, [j for j, c in enumerate(cube) if c == name]].mean(1) for name in cube], dim=1)
    for head in range(len(chance)):
        for i, name in enumerate(cube):
            taken = slow_top_p(chance[head, i, :name].tolist(), 0.4) | {name}
            got = (seen if seen.ndim == 2 else seen[head])[i]
            assert {c for c, here in zip(cube, got.tolist(), strict=True) if here} == taken
    assert seen.ndim == (2 if heads == "mean" else 3)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9])
def test_the_ratio_fixes_p_for_all_tokens(ratio: float) -> None:
    """One p for the whole layer: as many pairs as the ratio allows, own cubes not counted off, and none beyond."""
    signals = layer_of(random_clips(*CLIPS, ratio=ratio), ratio)
    cube = torch.tensor(slow_cubes(CLIPS, SIDES))
    seen = make_method("adaspark", {"cube": SIDES}).attended_pairs(signals)
    assert seen is not None
    n = len(cube)
    itself = int((cube[:, None] == cube).tril().sum())
    pairs, allowed = int(seen.tril(0).sum()) / HEADS, ratio * n * (n + 1) / 2
    assert itself <= pairs <= max(itself, allowed)
    assert pairs >= min(allowed, n * (n + 1) / 2) - 12 / HEADS, "another cube would have fitted"
    # The p that this is: what the last one of any list had ahead of it, below all that was left out.
    chance, taken, left = slow_chance(signals, cube.tolist(), True), [], []
    for head, rows in enumerate(chance):
        for i, row in enumerate(rows):
            mass = 0.0
            for name in sorted(range(len(row)), key=lambda c: (-row[c], c)):
                first = int((cube == name).nonzero()[0])
                (taken if bool(seen[head, i, first]) else left).append(mass)
                mass += row[name]
    assert not taken or not left or max(taken) <= min(left) + 1e-6


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_mlp_by_p(p: float) -> None:
    signals = layer_of(random_clips(*CLIPS), 0.5)
    cube = slow_cubes(CLIPS, SIDES)
    states = torch.randn(len(cube), 12, generator=torch.Generator().manual_seed(4))
    chosen = make_method("adaspark", {"p": p, "cube": SIDES}).mlp_tokens(signals, states)
    assert chosen is not None
    length = [math.sqrt(sum(x * x for x in row)) for row in states.double().tolist()]
    wanted = set()
    for name in set(cube):
        members = [i for i, c in enumerate(cube) if c == name]
        total = sum(length[i] for i in members)
        wanted |= {members[i] for i in slow_top_p([length[i] / total for i in members], p)}
    assert set(chosen.token.nonzero().flatten().tolist()) == wanted
    assert [[a == b for b in chosen.group] for a in chosen.group] == [[a == b for b in cube] for a in cube]


@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.8])
def test_mlp_by_ratio(ratio: float) -> None:
    signals = layer_of(random_clips(*CLIPS, ratio=ratio), ratio)
    cube = slow_cubes(CLIPS, SIDES)
    states = torch.randn(len(cube), 12, generator=torch.Generator().manual_seed(4))
    chosen = make_method("adaspark", {"cube": SIDES}).mlp_tokens(signals, states)
    assert chosen is not None
    assert int(chosen.token.sum()) == max(signals.budget, len(set(cube)))


def test_halves_and_layers_may_be_left_whole() -> None:
    signals = random_signals((4, 4), ratio=0.5)
    states = signals.hidden[signals.visual]
    for parameters, layer, wanted in (
        ({"first": 2}, 1, (False, False)),
        ({"first": 2}, 2, (True, True)),
        ({"attention": False}, 0, (False, True)),
        ({"mlp": False}, 0, (True, False)),
    ):
        method, here = make_method("adaspark", {"cube": (1, 2, 2), **parameters}), layer_of(signals, 0.5, layer)
        assert (method.attended_pairs(here) is not None, method.mlp_tokens(here, states) is not None) == wanted


def test_what_is_left_out_is_counted() -> None:
    """Pairs, MLP tokens, and FLOPs that follow; nothing leaves."""
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    with ivcp_eval.prune(model, "adaspark", 0.5, cube=(1, 2, 2), first=2) as run, torch.no_grad():
        model(**make_inputs("t5 i0 t9", "t12"))
    n, n_layers = run.visual_prompt[0], len(run.visual_per_layer)
    whole = n * (n + 1) // 2
    assert run.visual_pairs[:2] == [[whole, 0]] * 2
    assert run.visual_mlp[:2] == [[n, 0]] * 2
    assert all(0.3 * whole < pairs <= 0.5 * whole for pairs, _ in run.visual_pairs[2:])
    assert run.visual_mlp[2:] == [[round(0.5 * n), 0]] * (n_layers - 2)
    assert run.kept_ratio == run.cache_ratio == run.layer_mean_ratio == 1
    assert run.row(0).visual_mlp[-1] == [round(0.5 * n)]
    shape = DecoderShape.of(model.config)
    counts = [layer[0] for layer in run.visual_per_layer]
    pairs, mlp = [layer[0] for layer in run.visual_pairs], [layer[0] for layer in run.visual_mlp]
    shares = measured(n, 14, counts, counts, shape, pairs, mlp)
    assert shares.flops == 1
    total = n + 14
    saved = sum(
        2 * (n - through) * 3 * shape.hidden * shape.intermediate + 4 * (whole - seen) * shape.heads * shape.head_dim
        for seen, through in zip(pairs, mlp, strict=True)
    )
    assert shares.flops_analytic == pytest.approx(1 - saved / shape.prefill_flops([total] * n_layers), abs=1e-4)
    assert measured(n, 14, counts, counts, shape).flops_analytic is None


def test_counts_are_those_of_the_last_prompt() -> None:
    model, make_inputs = tiny_models.build("llava")
    with ivcp_eval.prune(model, "adaspark", 0.5) as run, torch.no_grad():
        model(**make_inputs("t5 i0 t9"))
        assert run.visual_mlp
        model(**make_inputs("t12"))
        assert not run.visual_mlp
        assert not run.visual_pairs
    with ivcp_eval.prune(model, "adaspark", 1.0) as run, torch.no_grad():
        model(**make_inputs("t5 i0 t9"))
    assert not run.visual_pairs


def test_other_kernels_are_refused() -> None:
    model: Any = copy.deepcopy(tiny_models.build("llava")[0])
    tiny_models.text_model("llava", model).config._attn_implementation = "flash_attention_2"
    with pytest.raises(Unsupported, match="load the model with sdpa or eager"), ivcp_eval.prune(model, "adaspark", 0.5):
        pass


def wrong_shape(signals: Signals) -> Tensor:
    return torch.ones(2, signals.n_visual, signals.n_visual, dtype=torch.bool)


def none_processed(signals: Signals, states: Tensor) -> Processed:
    del signals
    return Processed(torch.zeros(len(states), dtype=torch.bool), torch.zeros(len(states), dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("attended_pairs", wrong_shape, r"`attended_pairs` returned torch.bool \(2, 16, 16\)"),
        ("mlp_tokens", none_processed, "without a single token that is processed"),
        ("mlp_tokens", lambda signals, states: states, "expected a Processed, or None"),
    ],
)
def test_answers_that_are_none(name: str, wrong: Any, words: str) -> None:
    model, make_inputs = tiny_models.build("llava")
    method = make_method("adaspark", {})
    object.__setattr__(method, name, wrong)
    with pytest.raises((ValueError, TypeError), match=words), ivcp_eval.prune(model, method, 0.5), torch.no_grad():
        model(**make_inputs("t5 i0 t9"))


@pytest.mark.parametrize(
    "parameters",
    [{"p": 0}, {"p": 1.5}, {"cube": (1, 2)}, {"cube": (0, 2, 2)}, {"first": -1}, {"heads": "all"}, {"queries": "row"}],
)
def test_parameters_that_mean_nothing(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        make_method("adaspark", parameters)


def test_something_has_to_be_sparse() -> None:
    with pytest.raises(ValueError, match="nothing sparse"):
        make_method("adaspark", {"attention": False, "mlp": False})
