"""Oracle: the coordinate set and the budget with Python loops."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import ivcp_eval
from ivcp_eval.interface import AbstractMethod, Cut, ModelFacts, Selection, Signals
from ivcp_eval.interface.method import method_name
from ivcp_eval.interface.ops import budget as allowed
from ivcp_eval.interface.registry import make_method, method_names
from ivcp_eval.methods._plus_ivc import PlusIvc
from tests.engine import tiny_models
from tests.engine.contract.cases import RAGGED, Case
from tests.methods.material import best, random_signals
from tests.methods.test_families import a_family_of


def test_forced_set_and_budget() -> None:
    signals = random_signals((5, 8), (3, 4), ratio=0.5)
    rows = signals.attention([-1])[:, 0]
    scores = [float(rows[:, v].mean()) for v in signals.visual.tolist()]
    cos, sin = ([float(part[:, v].mean()) for v in signals.visual.tolist()] for part in signals.rope())
    wanted = []
    for start, n, budget in ((0, 40, 20), (40, 12, 6)):
        each = min(round(0.1 * n), round(0.2 * budget))
        forced = set(best(cos[start : start + n], each)) | set(best(sin[start : start + n], each))
        order = sorted((i for i in range(n) if i not in forced), key=lambda i: (-scores[start + i], i))
        wanted += sorted(start + i for i in [*forced, *order[: budget - len(forced)]])
    got = make_method("fastv+ivc").select(signals).keep.tolist()
    assert got == wanted
    assert got != make_method("fastv").select(signals).keep.tolist()
    assert (
        make_method("fastv+ivc", {"ivc": 0.0}).select(signals).keep.tolist()
        == make_method("fastv").select(signals).keep.tolist()
    )


def test_names_and_parameters() -> None:
    method = make_method("fastv+ivc", {"layer": 3, "ivc_share": 0.1})
    assert method_name(method) == "fastv+ivc"
    assert (method.inner.layer, method.ivc_share) == (3, 0.1)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'layers'; did you mean 'layer'"):
        make_method("fastv+ivc", {"layers": 3})
    for name in ("rotatek+ivc", "downsample+ivc"):
        with pytest.raises(ValueError, match="does not save by selecting tokens"):
            make_method(name)
    for name in ("none", "snapkv"):
        with pytest.raises(ValueError, match=f"'{name}' does not save by selecting tokens"):
            make_method(f"{name}+ivc").cuts(ModelFacts("llava", 8), 0.5)
    for name in ("fastv+ivc+ivc", "fastv+ive", "+ivc"):
        with pytest.raises(ValueError, match="unknown method"):
            make_method(name)


def _coordinates(signals: Signals) -> list[set[int]]:
    cos, sin = ([float(part[:, v].mean()) for v in signals.visual.tolist()] for part in signals.rope())
    found = []
    for image in signals.images:
        tokens = image.tokens.tolist()
        each = min(round(0.1 * len(tokens)), round(0.2 * image.budget))
        found.append({tokens[i] for part in (cos, sin) for i in best([part[t] for t in tokens], each)})
    return found


def test_a_greedy_method_gives_up_its_last_picks() -> None:
    """Literal: of DivPrune's order of picks, as many from its head as fit beside the coordinates."""
    signals = random_signals((5, 8), (3, 4), ratio=0.5)
    wanted: set[int] = set()
    for image, forced in zip(signals.images, _coordinates(signals), strict=True):
        states = torch.nn.functional.normalize(signals.hidden[signals.visual[image.tokens]].double(), dim=-1)
        distance = (1 - states @ states.T).tolist()
        n = len(distance)
        order = [max(range(n), key=lambda i: (min(distance[i][j] for j in range(n) if j != i), -i))]
        while len(order) < n:
            rest = [i for i in range(n) if i not in order]
            order.append(max(rest, key=lambda i: (min(distance[i][j] for j in order), -i)))
        kept = set(forced)
        for pick in order:
            if len(kept) < image.budget:
                kept.add(int(image.tokens[pick]))
        wanted |= kept
    got = make_method("divprune+ivc").select(signals)
    assert got.keep.tolist() == sorted(wanted)
    assert set(make_method("divprune").select(signals).keep.tolist()) != wanted


def test_a_set_of_the_best_gives_up_the_lowest_scored() -> None:
    """FastV as a method that returns sets ends where FastV with its scores does."""
    signals = random_signals((5, 8), (3, 4), ratio=0.5)
    scorer = make_method("fastv+ivc")
    assert isinstance(scorer, PlusIvc)
    hidden = replace(scorer, inner=AsSets(scorer.inner))
    assert hidden.select(signals).keep.tolist() == scorer.select(signals).keep.tolist()


@dataclass(frozen=True)
class AsSets(AbstractMethod):
    scorer: AbstractMethod

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return self.scorer.cuts(model, ratio)

    def select(self, signals: Signals) -> Selection:
        return self.scorer.select(signals)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("name", ["divprune", "iwp", "visionzip", "pool"])
def test_sets_hold_the_budget_and_the_coordinates(name: str, ratio: float) -> None:
    signals = random_signals((5, 8), (1, 1), (3, 4), ratio=ratio)
    got = make_method(f"{name}+ivc").select(signals)
    got.check(signals, name)
    kept = set(got.keep.tolist())
    for image, forced in zip(signals.images, _coordinates(signals), strict=True):
        assert forced <= kept
        assert len(kept & set(image.tokens.tolist())) == image.budget
    if got.merge is not None:
        merge = got.merge.to_dense()
        plain = torch.zeros_like(merge)
        plain[torch.arange(len(kept)), got.keep] = 1
        alone = (merge == plain).all(dim=1)
        own = make_method(name).select(signals)
        assert own.merge is not None
        merged = {int(k) for k, w in zip(own.keep, own.merge.to_dense(), strict=True) if int((w != 0).sum()) > 1}
        assert {int(k) for k in got.keep[~alone]} or not merged, "what the method merges stays merged"


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.8])
def test_a_method_that_draws_draws_the_same_however_often_it_is_asked(ratio: float) -> None:
    """With fresh draws at every question the search for what fits never ended."""
    for seed in range(5):
        signals = random_signals((5, 8), (1, 1), (3, 4), ratio=ratio, seed=seed)
        make_method("ivc_prune+ivc", {"foreground": False}).select(signals).check(signals, "ivc_prune+ivc")


def test_what_a_method_remembers_is_that_of_its_last_choice() -> None:
    signals = random_signals((5, 8), ratio=0.5)
    signals.memory["asked"] = []
    got = PlusIvc(Remembers()).select(signals)
    (asked,) = signals.memory["asked"]
    assert set(range(asked)) <= set(got.keep.tolist())
    assert asked < signals.budget


@dataclass(frozen=True)
class Remembers(AbstractMethod):
    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return (Cut(2, ratio), Cut(4, ratio / 2))

    def select(self, signals: Signals) -> Selection:
        signals.memory["asked"] = [*signals.memory["asked"], signals.budget]
        return Selection(torch.arange(signals.budget))


def test_a_rule_of_its_own_is_refused() -> None:
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    method = make_method("sparsevlm+ivc", {"counts": "rank", "scale": 1.0})
    with (
        pytest.raises(ValueError, match="by a rule of its own"),
        ivcp_eval.prune(model, method, 0.25),
        torch.no_grad(),
    ):
        model(**make_inputs("t5 i0 t9"))


def _selects(name: str) -> bool:
    method = make_method(name)
    evicts = any(cut.evicts for cut in method.cuts(ModelFacts("llava", 8), 0.5))
    on_cache = evicts or bool(method.needs & {"cached_key", "step", "sparse"})
    in_tower = "group" in method.tower_signals
    return (
        method.pixel_share(0.5) is None
        and not on_cache
        and not in_tower
        and name not in ("none", "again", "deployed", "framefusion")
    )


@pytest.mark.parametrize("name", [name for name in method_names() if _selects(name)])
def test_every_selecting_method_runs_with_it(name: str) -> None:
    case = Case(a_family_of(name), f"{name}+ivc", ratio=0.25)
    with case.prune() as recording:
        case.forward(case.inputs(*RAGGED))
    assert recording.run.method == f"{name}+ivc"
    assert recording.run.visual_kept == [sum(allowed(0.25, n) for n in case.image_sizes(row)) for row in RAGGED]
