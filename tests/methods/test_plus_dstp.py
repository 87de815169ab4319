"""Oracle: detection, swap and return with Python loops over random attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ivcp_eval
from ivcp_eval.interface import Cut, ModelFacts
from ivcp_eval.interface.method import method_name
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import default_parameters, make_method
from ivcp_eval.methods._plus_dstp import PlusDstp, Reserve
from tests.engine import tiny_models
from tests.engine.contract.cases import RAGGED, Case
from tests.methods.material import best, random_signals, random_steps, slow_attention

LAYERS = 8


def prefilled(name: str, ratio: float, **parameters: Any) -> tuple[PlusDstp, dict[str, Any], list[int], list[Any]]:
    """The method, its memory after a prefill of random signals, what the inner method keeps, and the anchor rows."""
    method = make_method(name, parameters)
    assert isinstance(method, PlusDstp)
    signals = random_signals((5, 6), ratio=1.0)
    for cut in method.cuts(ModelFacts("llava", LAYERS), ratio):
        assert cut.ratio == 1
        selection = method.select(replace(signals, cut=cut))
        assert selection.keep.tolist() == list(range(30))
    alone = method.inner.select(replace(random_signals((5, 6), ratio=ratio), cut=Cut(2, ratio)))
    anchor = signals.attention(torch.tensor([signals.hidden.shape[0] - 1]))[:, 0, signals.visual].tolist()
    return method, signals.memory, alone.keep.tolist(), anchor


def slow(kept: list[int], anchor: list[list[float]], tau: float, hold: int, watch: int, n: int) -> list[list[int]]:
    """What each layer of each step attends to."""

    def mean(rows: list[list[float]]) -> list[float]:
        return [sum(row[i] for row in rows) / len(rows) for i in range(len(rows[0]))]

    reserved = [token for token in range(n) if token not in kept]
    before = mean([[row[t] / sum(row[k] for k in kept) for t in kept] for row in anchor])
    now, until, wanted = kept, 0, []
    for step in random_steps(LAYERS, 12, n, 0.0, {}):
        if step.layer == watch and step.number >= until:
            now, current = kept, mean(slow_attention(step, kept))
            product = sum(a * b for a, b in zip(before, current, strict=True))
            norms = sum(a * a for a in before) ** 0.5 * sum(b * b for b in current) ** 0.5
            if product / norms < tau:
                weight = dict(zip(kept, current, strict=True))
                weight |= dict(zip(reserved, mean(slow_attention(step, reserved)), strict=True))
                found = best([weight[token] for token in range(n)], len(kept))
                now, until = sorted({*kept, *found}), step.number + hold
        wanted.append(now)
    return wanted


@pytest.mark.parametrize(("tau", "hold"), [(0.6, 3), (0.75, 2), (1.0, 1), (-1.0, 3)])
def test_formula(tau: float, hold: int) -> None:
    method, memory, kept, anchor = prefilled("fastv+dstp", 0.3, tau=tau, hold=hold)
    got = [method.attended(step) for step in random_steps(LAYERS, 12, 30, 0.3, memory)]
    wanted = slow(kept, anchor, tau, hold, LAYERS // 2, 30)
    assert [mask.nonzero().flatten().tolist() for mask in got if mask is not None] == wanted
    swapped = [layer for layer in wanted if layer != kept]
    assert bool(swapped) == (tau > 0)
    assert all(len(kept) < len(layer) <= 2 * len(kept) for layer in swapped)
    assert tau != 0.6 or wanted[-1] == kept != wanted[-2 * LAYERS], "it never came back"


def test_a_stage_chooses_among_what_the_one_before_kept() -> None:
    method = make_method("pyramiddrop+dstp")
    signals = random_signals((5, 6), (3, 4), ratio=1.0)
    inner = make_method("pyramiddrop")
    kept = list(range(42))
    for cut in method.cuts(ModelFacts("llava", LAYERS), 0.2):
        assert isinstance(cut, Reserve)
        method.select(replace(signals, cut=cut))
        if cut.inner is None:
            continue
        scores = inner.score(signals).tolist()  # type: ignore[attr-defined]
        chosen = []
        for tokens, n in ((range(30), 30), (range(30, 42), 12)):
            mine = [token for token in kept if token in tokens]
            chosen += [mine[i] for i in best([scores[token] for token in mine], budget(cut.inner.ratio, n))]
        kept = sorted(chosen)
        assert signals.memory["dstp"].now.nonzero().flatten().tolist() == kept
    assert len(kept) == budget(0.2, 30) + budget(0.2, 12)


@pytest.mark.parametrize("name", ["fastv", "visionzip", "random"])
def test_in_a_model_decoding_attends_to_what_the_method_keeps(name: str) -> None:
    """Of a method that cuts once: the survivors of its own prefill."""
    case = Case("qwen2_5_vl", f"{name}+dstp", (("tau", -1.0),), ratio=0.25)
    inputs = case.inputs(*RAGGED)
    with case.prune() as recording:
        case.generate(inputs, 3)
    with case.but(method=name, parameters=()).prune() as alone:
        case.forward(inputs)
    visual = [(row == case.image_token).nonzero().flatten() for row in inputs["input_ids"]]
    first = [mask for step, mask in recording.steps if step.layer == 0 and step.number == 0]
    for row, mask in enumerate(first):
        kept = set(alone.run.kept[row].tolist())
        assert mask is not None
        assert visual[row][mask].tolist() == [c for c in visual[row].tolist() if c in kept]
    run = recording.run
    assert run.method == f"{name}+dstp"
    assert run.kept_ratio == run.cache_ratio == 1, "nothing is freed"
    assert run.analytic_share(0, 2) == pytest.approx(alone.run.visual_kept[0] / run.visual_prompt[0])


def test_reserved_tokens_are_seen_where_attention_shifts() -> None:
    model, make_inputs = tiny_models.build("llava")
    shares = {}
    for tau in (-1.0, 1.0):
        with ivcp_eval.prune(model, "fastv+dstp", 0.25, tau=tau, hold=1) as run:
            model.generate(**make_inputs("t5 i0 t9"), max_new_tokens=4, do_sample=False)
        shares[tau] = run.analytic_share(0, 3)
    assert shares[-1.0] == pytest.approx(0.25, abs=0.02)
    assert shares[1.0] is not None
    assert shares[-1.0] < shares[1.0] <= 0.5


def test_names_and_parameters() -> None:
    method = make_method("fastv+dstp", {"layer": 3, "tau": 0.6})
    assert method_name(method) == "fastv+dstp"
    assert (method.inner.layer, method.tau, method.hold) == (3, 0.6, 20)  # type: ignore[attr-defined]
    assert set(default_parameters("fastv+dstp")) == {"layer", "tau", "hold", "watch"}
    for name in ("rotatek", "downsample", "fastocr"):
        with pytest.raises(ValueError, match="does not save by selecting tokens at a cut"):
            make_method(f"{name}+dstp")
    for name in ("none", "snapkv"):
        with pytest.raises(ValueError, match="leaves none in reserve"):
            make_method(f"{name}+dstp").cuts(ModelFacts("llava", LAYERS), 0.5)
    for name in ("fastv+ivc+dstp", "fastv+dstp+dstp", "+dstp"):
        with pytest.raises(ValueError, match="unknown method"):
            make_method(name)


@pytest.mark.parametrize("parameters", [{"tau": 2.0}, {"hold": 0}, {"watch": 1.5}])
def test_refused_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(parameters))):
        make_method("fastv+dstp", parameters)
