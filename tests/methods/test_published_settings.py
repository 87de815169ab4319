"""Published settings that no recorded answer reaches: budgets and constants around the authors' functions.

`defaults.json` has the parameters and cuts of methods that results were published with here. Rows carry a method's name
alone where nothing was set, so a change there changes what old rows mean; it belongs into the changelog, and then into
that file: ``python -m tests.methods.test_published_settings``. A new method enters it with its first results.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ivcp_eval.interface import ModelFacts, registry
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import default_parameters, make_method
from tests.methods.material import random_signals

DEFAULTS = Path(__file__).with_name("defaults.json")
MODELS = (ModelFacts("llava", 32), ModelFacts("qwen2_5_vl", 28, position_axes=3), ModelFacts("internvl", 24))


def settings(name: str) -> dict[str, Any]:
    """Parameters, and by family the cuts at half of the tokens and at a ninth."""
    cuts: dict[str, Any] = {}
    for facts in MODELS:
        for ratio in (0.5, 1 / 9):
            try:
                found = make_method(name).cuts(facts, ratio)
            except registry.Unsupported as error:
                cuts[f"{facts.family} {ratio:.2f}"] = str(error)
                continue
            cuts[f"{facts.family} {ratio:.2f}"] = [
                f"{cut.layer}: {cut.ratio:.6g} {cut.cache}{' renumber' if cut.renumber else ''} {cut.budget}"
                for cut in found
            ]
    return {"parameters": {k: str(v) for k, v in default_parameters(name).items()}, "cuts": cuts}


KNOWN = json.loads(DEFAULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", KNOWN)
def test_defaults_are_those_that_results_were_made_with(name: str) -> None:
    assert KNOWN[name] == settings(name)


@pytest.mark.parametrize(("kept", "first"), [(1 / 18, 1 / 6), (0.402, 0.6)], ids=["image questions", "RefCOCO"])
def test_vscan_keeps_the_published_pairs(kept: float, first: float) -> None:
    """Published: 1/6 before and 1/18 in the middle; on RefCOCO 0.6 and 0.402."""
    at_input, middle = make_method("vscan").cuts(MODELS[0], kept)
    assert (at_input.ratio, middle.ratio, middle.layer) == (pytest.approx(first), kept, 16)


def test_vscans_windows_get_equal_parts_and_the_global_scan_what_is_left() -> None:
    """With a class token; half of 100 tokens are three in each of 16 windows, and two more that attention finds."""
    signals = random_signals((24, 24), ratio=100 / 576, seed=6)
    early, deep = signals.vision["early/received"], signals.vision["received"]
    signals.vision = {**signals.vision, "cls": deep, "early/cls": early}
    local: list[int] = []
    for window in range(16):
        inside = [t for t in range(576) if t // 24 // 6 * 4 + t % 24 // 6 == window]
        local += sorted(inside, key=lambda t: -float(early[t]))[:3]
    rest = sorted((t for t in range(576) if t not in local), key=lambda t: -float(deep[t]))
    assert make_method("vscan").select(signals).keep.tolist() == sorted(local + rest[:52])


def test_vscans_second_cut_is_by_the_last_tokens_attention() -> None:
    signals = random_signals((4, 6), (3, 5), ratio=0.4, stage=1, seed=5)
    last = signals.attention(torch.tensor([signals.hidden.shape[0] - 1]))[:, 0].mean(dim=0)
    wanted = []
    for image in signals.images:
        order = last[signals.visual[image.tokens]].argsort(descending=True, stable=True)
        wanted += image.tokens[order[: image.budget]].tolist()
    selection = make_method("vscan").select(signals)
    assert selection.keep.tolist() == sorted(wanted)
    assert selection.merge is None


@pytest.mark.parametrize(("grid", "per_round"), [((24, 24), 8), ((36, 36), 24)], ids=str)
def test_vispruner_drops_eight_duplicates_a_round_of_576_tokens(grid: tuple[int, int], per_round: int) -> None:
    signals = random_signals(grid, ratio=0.2, seed=1)
    attention, feature = (
        signals.vision["received"],
        torch.nn.functional.normalize(signals.vision["feature"].float(), dim=1),
    )
    order = attention.argsort(descending=True, stable=True)
    n_kept = budget(0.2, attention.numel())
    important, rest = order[: n_kept // 2], order[n_kept // 2 :]
    while rest.numel() > n_kept - n_kept // 2:
        even, odd = rest[::2], rest[1::2]
        likeness = (feature[even] @ feature[odd].T).amax(1).argsort(descending=True, stable=True)
        leave = min(per_round, rest.numel() - (n_kept - n_kept // 2))
        rest = torch.cat((even[likeness[leave:]], odd))
    expected = torch.cat((important, rest)).sort().values
    assert make_method("vispruner").select(signals).keep.tolist() == expected.tolist()


@pytest.mark.parametrize(("class_token", "count"), [(True, 16), (False, 7)])
def test_holov_cuts_into_as_many_stretches_as_released(class_token: bool, count: int) -> None:
    """16 for LLaVA; for Qwen 1024/576 times what 576 tokens are of a quarter of them, rounded down."""
    signals = random_signals((24, 24), ratio=0.25, seed=3)
    if class_token:
        signals.vision = {**signals.vision, "cls": signals.vision["received"]}
    answers = {n: make_method("holov", {"stretches": n}).select(signals).keep.tolist() for n in (7, 16)}
    assert make_method("holov").select(signals).keep.tolist() == answers[count]
    assert answers[7] != answers[16]


def test_holov_fills_places_by_attention_where_zeros_are_not_wanted() -> None:
    signals = random_signals((12, 12), ratio=0.4, seed=4)
    signals.vision = {**signals.vision, "received": (3 * signals.vision["received"]).exp()}
    zeros, best = (make_method("holov", {"stretches": 16, "fill": fill}).select(signals) for fill in ("zeros", "best"))
    assert zeros.merge is not None
    filled = zeros.merge.to_dense().sum(dim=1) > 0
    by_stretch = set(zeros.keep[filled].tolist())
    n_left = int((~filled).sum())
    assert 0 < n_left < len(filled)
    order = signals.vision["received"].argsort(descending=True, stable=True).tolist()
    rest = [token for token in order if token not in by_stretch][:n_left]
    assert set(best.keep.tolist()) == by_stretch | set(rest)
    assert best.merge is not None
    assert (best.merge.to_dense().sum(dim=1) == 1).all()


def test_prumerge_plus_takes_a_quarter_of_its_budget_by_attention() -> None:
    """A quarter, rounded up; one place is that of the mean of all others."""
    from ivcp_eval.methods.prumerge_plus import Method

    attention = torch.randn(576, generator=torch.Generator().manual_seed(0))
    for tokens, by_attention in ((144, 36), (65, 16), (66, 17)):
        centres = Method().centres(attention, tokens)
        best = attention.argsort(descending=True)
        assert centres.numel() == tokens - 1
        assert centres[:by_attention].tolist() == best[:by_attention].tolist()
        left = sorted(set(range(576)) - set(best[:by_attention].tolist()))
        places = [left.index(place) for place in centres[by_attention:].tolist()]
        assert places == sorted(places)
        steps = [b - a for a, b in itertools.pairwise(places)]
        assert max(steps) - min(steps) <= 1, "the others lie evenly"


@pytest.mark.parametrize(("family", "rank"), [("qwen2_5_vl", 8), ("qwen3_vl", 8), ("llava", 4), ("internvl", 4)])
def test_lrcp_removes_as_many_directions_as_the_port(family: str, rank: int) -> None:
    signals = random_signals((12, 12), ratio=0.3, seed=2)
    signals.family = family
    default = make_method("lrcp").select(signals).keep.tolist()
    answers = {r: make_method("lrcp", {"rank": r}).select(signals).keep.tolist() for r in (4, 8)}
    assert default == answers[rank]
    assert answers[4] != answers[8]


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(settings(name))}" for name in registry.method_names()]
    DEFAULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
