"""Oracle: joining of roots, pair by pair with every cosine held; whole forests are held to the authors' (oracle/)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods import forestprune
from ivcp_eval.methods.forestprune import most_alike
from tests.methods.material import random_clips, random_signals


def one_by_one(unit: Tensor, times: int) -> list[tuple[int, int]]:
    cosine, left, pairs = (unit.double() @ unit.double().T).tolist(), list(range(len(unit))), []
    while len(pairs) < times:
        _, upper, lower = min((-cosine[i][j], i, j) for i in left for j in left if i < j)
        pairs.append((upper, lower))
        left.remove(lower)
    return pairs


@pytest.mark.parametrize("neighbours", [2, 64])
@pytest.mark.parametrize("clusters", [3, 60])
def test_pairs(clusters: int, neighbours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forestprune, "NEIGHBOURS", neighbours)
    generator = torch.Generator().manual_seed(clusters)
    centres = torch.randn(clusters, 6, generator=generator)
    noise = torch.randn(60, 6, generator=generator)
    unit = torch.nn.functional.normalize(centres[torch.arange(60) % clusters] + 0.3 * noise, dim=1)
    for times in (0, 1, 40, 59):
        assert most_alike(unit, times) == one_by_one(unit, times)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_one_image_is_gprunes_half_less_the_joined_roots(ratio: float) -> None:
    signals = random_signals((5, 8), ratio=ratio, seed=3)
    kept = make_method("forestprune").select(signals).keep.tolist()
    half = random_signals((5, 8), ratio=max(0.5, ratio), seed=3)
    spatial = make_method("gprune").select(half).keep
    unit = torch.nn.functional.normalize(signals.hidden[signals.visual[spatial]], dim=1)
    leaving = {lower for _, lower in one_by_one(unit, len(spatial) - len(kept))}
    assert kept == [int(token) for place, token in enumerate(spatial) if place not in leaving]
    assert len(kept) == round(ratio * 40)
    assert ratio >= 0.5 or kept != make_method("gprune").select(signals).keep.tolist()


def test_frames_share_a_budget() -> None:
    signals = random_clips((3, 4, 5), ratio=0.25, seed=1)
    still = signals.hidden.clone()
    for first in (20, 40):  # a still picture: the later frames grow the trees of the first
        still[signals.visual[first : first + 20]] = still[signals.visual[:20]]
    signals.hidden = still
    selection = make_method("forestprune").select(signals)
    selection.check(signals, "forestprune")
    counts = [int(torch.isin(selection.keep, image.tokens).sum()) for image in signals.images]
    assert counts == [10, 5, 0]


def test_refused_parameters() -> None:
    with pytest.raises(ValueError, match="alike=0"):
        make_method("forestprune", {"alike": 0.0})
