"""Oracle: the rule chain by chain in Python; what its steps leave is the budget, in a model too."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from ivcp_eval.engine.signals.source import images_at_cut
from ivcp_eval.interface import Cut, ModelFacts, Unsupported
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods.framefusion import Method, Progress, chains, to_remove
from tests.engine import tiny_models
from tests.methods.material import pruned_columns, random_clips
from tests.methods.test_merged_clips import every_stage, scene


def slow_merge(states: torch.Tensor, place: list[int], bound: float, most: int) -> dict[int, list[int]]:
    """Of each token that goes on, what becomes its mean; ``most``: only the so many most alike are merged."""
    unit, last, alike = torch.nn.functional.normalize(states, dim=1), {}, {}
    for token, where in enumerate(place):
        if where in last:
            alike[token] = float(unit[token] @ unit[last[where]])
        last[where] = token
    joining = sorted((t for t in alike if alike[t] >= bound), key=lambda t: -alike[t])
    joining = joining if len(joining) < most else joining[:most]
    groups: dict[int, list[int]] = {}
    head: dict[int, int] = {}
    for token, where in enumerate(place):
        if token not in joining:
            head[where] = token
        groups.setdefault(head[where], []).append(token)
    return groups


@pytest.mark.parametrize("most", [3, 9, 100])
def test_merging(most: int) -> None:
    generator = torch.Generator().manual_seed(most)
    place = [p for _ in range(5) for p in range(6) if torch.rand((), generator=generator) < 0.8]
    states = torch.randn(6, 8, generator=generator)[place] + 0.5 * torch.randn(len(place), 8, generator=generator)
    share = most / len(place)
    (kept, weights), after = Method().merged(states, torch.tensor(place), share, most, Progress())
    groups = slow_merge(states, place, 0.6, most)
    assert kept.tolist() == list(groups)
    wanted = torch.stack([states[members].mean(dim=0) for members in groups.values()])
    torch.testing.assert_close(weights.to_dense() @ states, wanted)
    joined = len(place) - len(kept)
    assert after == (
        Progress((joined / len(place),), joined < 0.1 * len(place)) if most == 100 else Progress((), True, True)
    )


def test_chains_are_of_places() -> None:
    order, before = chains(torch.tensor([0, 1, 2, 0, 2, 0]))
    assert order.tolist() == [0, 3, 5, 1, 2, 4]
    assert before.tolist() == [-1, -1, -1, 0, 2, 3]


def test_the_released_share_makes_the_mean_of_28_layers_the_cost() -> None:
    for merged in ((), (0.3,), (0.3, 0.05)):
        gone = to_remove(merged, 0.3)
        left, layers = 1.0, []
        for share in merged:
            left *= 1 - share
            layers.append(left)
        layers += [left * (1 - gone)] * (28 - len(merged))
        assert sum(layers) / 28 == pytest.approx(0.3)
    assert to_remove((0.5,), 0.9) == 0, "merging alone saved more"


@pytest.mark.parametrize("noise", [0.1, 0.6, None], ids=["alike", "less alike", "other frames"])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.8])
def test_in_the_end_every_video_has_its_budget(ratio: float, noise: float | None) -> None:
    signals = random_clips((4, 3, 4), (0, 3, 3), (3, 2, 2), ratio=ratio, seed=2)
    if noise is not None:
        signals = scene(signals, noise)
    stages = every_stage("framefusion", signals, ratio)
    kept = [counts for _, _, counts in stages]
    assert kept[-1] == [max(1, round(ratio * n)) for n in (48, 9, 12)]
    assert all(now >= later for a, b in itertools.pairwise(kept) for now, later in zip(a, b, strict=True))
    assert stages[-1][1].exact
    if noise == 0.1:
        assert kept[0][0] < 48, "what is alike is merged before the first layer"
    if noise is None:
        assert kept[0][0] == 48, "what is not is pruned by attention, behind the first layer that merged little"


@pytest.mark.parametrize("value", [0.0, 1.0, torch.nan, torch.inf, -torch.inf])
def test_nothing_to_rank_by(value: float) -> None:
    for ratio in (0.02, 0.3, 0.9):
        signals = random_clips((7, 3, 5), (0, 1, 1), (2, 2, 2), ratio=ratio)
        signals.hidden[signals.visual] = value
        *_, (_, _, kept) = every_stage("framefusion", signals, ratio)
        assert kept == [max(1, round(ratio * n)) for n in (105, 1, 8)]


def test_coordinates_have_no_room_beside_it() -> None:
    with pytest.raises(ValueError, match="sets how many tokens stay by a rule of its own"):
        every_stage("framefusion+ivc", random_clips((4, 3, 4), seed=2), 0.5)


def test_places_are_those_of_the_prompt() -> None:
    """After a first cut: a token's predecessor is the last alive one at its place, not of its number in the frame."""
    signals = random_clips((3, 1, 3), ratio=0.5)
    keep = torch.tensor([0, 1, 2, 4, 6, 7])
    alive = signals.visual[keep]
    cut = Cut(1, 0.5, budget="clip")
    images = images_at_cut([image.span for image in signals.images], alive, 0.5, "clip")
    states = torch.eye(12)[:6] * 5
    states[3] = states[1]  # place 1 of the second frame, whose only token it is
    hidden = signals.hidden.clone()
    hidden[alive] = states
    now = replace(signals, images=images, columns=alive, visual=alive, hidden=hidden, cut=cut, stage=1, memory={})
    selection = make_method("framefusion", {"ratio_lower_bound": 0.0}).select(now)
    assert selection.keep.tolist() == [0, 1, 2, 4, 5]
    assert not selection.exact


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = tiny_models.family("qwen2_5_vl")
    _, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs = make_inputs("t5 v0 t9")
    columns = (inputs["input_ids"][0] == module.VIDEO).nonzero().flatten().tolist()
    kept = pruned_columns("framefusion", "qwen2_5_vl", inputs, 0.5)[0]
    assert len([c for c in kept if c in columns]) == round(0.5 * len(columns))


def test_what_is_refused() -> None:
    with pytest.raises(Unsupported, match="cuts at two layers or more, but the model has 1"):
        make_method("framefusion").cuts(ModelFacts("llava", 1), 0.5)
    for depth, cuts in ((2, 2), (3, 3), (4, 4), (28, 4)):
        assert len(make_method("framefusion").cuts(ModelFacts("llava", depth), 0.5)) == cuts
    for parameters in ({"steps": 0}, {"similarity_lower_bound": 2.0}, {"ratio_lower_bound": -0.1}):
        with pytest.raises(ValueError, match="similarity_lower_bound"):
            make_method("framefusion", parameters)
