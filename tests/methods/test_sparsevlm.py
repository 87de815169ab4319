"""Oracle: the formulas with Python loops, the published token lists, and the first release's rank rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ivcp_eval.interface import ModelFacts, Selection, Signals
from ivcp_eval.interface.ops import density_peaks
from ivcp_eval.interface.registry import make_method
from tests.methods.material import best, random_signals


def staged(signals: Signals, **parameters: object) -> Selection:
    """The first stage after the observation."""
    method = make_method("sparsevlm", parameters)
    observation = method.select(replace(signals, images=tuple(replace(i, budget=i.n_prompt) for i in signals.images)))
    assert observation.keep.numel() == signals.n_visual
    return method.select(replace(signals, stage=1))


def raters(signals: Signals) -> list[int]:
    """Question tokens that the image matches more than average, at the input."""
    question = signals.question.tolist()
    match = [0.0] * len(question)
    for v in signals.visual.tolist():
        logits = torch.tensor([float(signals.hidden[v] @ signals.hidden[t]) for t in question], dtype=torch.float64)
        for i, p in enumerate(logits.softmax(0).tolist()):
            match[i] += p / signals.n_visual
    return [t for t, m in zip(question, match, strict=True) if m > sum(match) / len(match)]


def scores(signals: Signals) -> list[float]:
    attention = signals.attention(raters(signals))  # (heads, raters, n)
    return [float(attention[:, :, v].double().mean()) for v in signals.visual.tolist()]


def dpc_knn(x: Tensor, k: int) -> tuple[list[int], list[int]]:
    """Centres, and the cluster of each row."""
    n = len(x)
    d = [[float((a - b).norm()) / x.shape[1] ** 0.5 for b in x] for a in x]
    density = [2.718281828459045 ** (-sum(v * v for v in sorted(row)[:k]) / k) for row in d]
    longest = max(map(max, d))
    parent = [
        min([d[i][j] for j in range(n) if (-density[j], j) < (-density[i], i)], default=longest) for i in range(n)
    ]
    centres = sorted(range(n), key=lambda i: (-parent[i] * density[i], i))[:k]
    cluster = [
        centres.index(i) if i in centres else min(range(k), key=lambda c: (d[i][centres[c]], c)) for i in range(n)
    ]
    return centres, cluster


def test_raters_and_ranking() -> None:
    signals = random_signals((4, 6), ratio=0.5)
    assert 0 < len(raters(signals)) < signals.question.numel()
    kept = staged(signals, recycle=False).keep.tolist()
    assert kept == best(scores(signals), 12)


def test_recycling() -> None:
    signals = random_signals((10, 12), ratio=0.4, seed=3)
    selection, score, n, budget = staged(signals), scores(signals), 120, 48
    # The counts of the released rule that add up to the budget.
    split = [(k, c) for k in range(1, n) for c in [int((int((n - k) * 0.3) + 1) / 10) + 1] if k + c == budget]
    n_kept, n_clusters = split[0]
    assert n_clusters == 3
    order = sorted(range(n), key=lambda i: (-score[i], i))
    pool = order[n_kept : n_kept + int((n - n_kept) * 0.3) + 1]
    hidden = signals.hidden[signals.visual]
    centres, cluster = dpc_knn(hidden[pool].double(), n_clusters)
    wanted = {i: hidden[i] for i in order[:n_kept]}
    for number, centre in enumerate(centres):
        members = [pool[i] for i in range(len(pool)) if cluster[i] == number]
        wanted[pool[centre]] = sum(hidden[i] for i in members) / len(members)  # type: ignore[assignment]
    assert selection.keep.tolist() == sorted(wanted)
    assert selection.merge is not None
    got = selection.merge @ hidden
    for row, token in enumerate(selection.keep.tolist()):
        assert torch.allclose(got[row], wanted[token], atol=1e-5)


def test_density_peaks() -> None:
    generator = torch.Generator().manual_seed(1)
    for n, k in ((9, 2), (30, 5), (4, 4), (1, 1)):
        x = torch.randn(n, 6, generator=generator)
        centres, cluster = density_peaks(x, k)
        assert (centres.tolist(), cluster.tolist()) == dpc_knn(x.double(), k)
    # Hidden states share a few huge channels; distances must not drown in them.
    x = torch.randn(60, 6, generator=generator)
    x[:, 0] += 3000
    centres, cluster = density_peaks(x, 5)
    assert (centres.tolist(), cluster.tolist()) == dpc_knn(x.double(), 5)
    centres, cluster = density_peaks(torch.ones(5, 3), 2)
    assert sorted(cluster.unique().tolist()) == [0, 1], "equal states still make k clusters"


@pytest.mark.parametrize("listed", [(300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17)])
def test_published_lists(listed: tuple[int, int, int]) -> None:
    alive, totals = 576, []
    for kept in listed:
        pool = int((alive - kept) * 0.3) + 1
        alive = kept + int(pool / 10) + 1
        totals.append(alive)
    cuts = make_method("sparsevlm").cuts(ModelFacts("llava", 32), totals[-1] / 576)
    assert (cuts[0].layer, cuts[0].ratio) == (0, 1)
    assert [cut.layer for cut in cuts[1:]] == [3, 7, 16], "before layer k: after the attention of layers 2, 6, 15"
    assert [cut.ratio * 576 for cut in cuts[1:]] == pytest.approx(totals)


def test_stage_ratios_stay_ordered() -> None:
    for ratio in (0.001, 0.02, 0.05, 0.11, 0.3, 0.5, 0.75, 0.999):
        cuts = make_method("sparsevlm").cuts(ModelFacts("llava", 32), ratio)[1:]
        assert cuts[-1].ratio == pytest.approx(ratio)
        assert 1 >= cuts[0].ratio >= cuts[1].ratio >= cuts[2].ratio > 0


def test_rank_rule() -> None:
    signals = random_signals((6, 8), ratio=0.5, seed=2)
    attention = signals.attention(raters(signals))[:, :, signals.visual].mean(0)
    rank = int((torch.linalg.svdvals(attention.double()) > 1e-5).sum())
    selection = staged(signals, counts="rank", scale=4.5, bias=2.0, recycle=False)
    assert not selection.exact
    assert selection.keep.tolist() == best(scores(signals), int(rank * 4.5 + 2))
    n_dropped = 48 - int(rank * 4.5 + 2)
    recycled = staged(signals, counts="rank", scale=4.5, bias=2.0)
    assert recycled.keep.numel() == int(rank * 4.5 + 2) + int((int(n_dropped * 0.3) + 1) / 10) + 1


def test_rank_rule_has_four_stages() -> None:
    """Reference 91fb6d9: after layers 2, 6, 15 and 19."""
    cuts = make_method("sparsevlm", {"counts": "rank"}).cuts(ModelFacts("llava", 32), 0.5)
    assert [cut.layer for cut in cuts] == [0, 3, 7, 16, 20]
    make_method("sparsevlm", {"counts": "rank", "depths": (0.1, 0.2, 0.3, 0.4)})


def test_bad_parameters() -> None:
    for parameters in ({"counts": "all"}, {"depths": ()}, {"depths": (0.5, 0.1)}, {"depths": (0.1, 0.2, 0.3, 0.4)}):
        with pytest.raises(ValueError, match=r"counts|depths"):
            make_method("sparsevlm", parameters)
