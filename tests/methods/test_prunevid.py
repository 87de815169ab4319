"""Oracle: the question's attention written out, and labels by hand; beside the recorded answers (test_oracles)."""

from __future__ import annotations

import math

import pytest
import torch

from ivcp_eval.interface import ModelFacts
from ivcp_eval.interface.ops import apportion
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods.prunevid import Method, mean_cosines, question_attention, refined, windows_of
from tests.methods.material import best, random_clips
from tests.methods.test_merged_clips import every_stage, scene


def test_attention_of_the_question() -> None:
    signals = random_clips((2, 2, 3), seed=1)
    assert signals.query is not None
    assert signals.key is not None
    heads, n, size = signals.query.shape
    groups = signals.key.shape[0]
    most = [0.0] * 12
    for head in range(heads):
        for row in signals.question.tolist():
            logits = [
                float(signals.query[head, row].double() @ signals.key[head * groups // heads, column].double())
                / size**0.5
                for column in range(n)
            ]
            total = sum(math.exp(logit) for logit in logits)
            for token, column in enumerate(signals.visual.tolist()):
                most[token] = max(most[token], math.exp(logits[column]) / total)
    assert torch.allclose(question_attention(signals).double(), torch.tensor(most, dtype=torch.float64), atol=1e-6)
    assert torch.equal(question_attention(signals, chunk=2), question_attention(signals))


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ([0], [0]),
        ([0, 0, 1, 1, 1], [0, 0, 1, 1, 1]),
        ([0, 0, 1, 2, 2, 2], [0, 0, 2, 2, 2, 2]),
        ([0, 0, 1, 2, 2], [0, 0, 0, 2, 2]),
        ([0, 0, 0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]),
        ([1, 0, 0, 2], [0, 0, 0, 0]),
        ([0, 1, 0, 1], [0, 0, 0, 0]),
        ([0, 0, 1, 0, 2, 2, 2, 2], [0, 0, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_labels_are_smoothed(labels: list[int], wanted: list[int]) -> None:
    assert refined(labels) == wanted


def test_windows_and_cosines() -> None:
    assert windows_of([3, 3, 1, 0, 0]) == [(0, 2), (2, 3), (3, 5)]
    states = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    unit = states / states.norm(dim=2, keepdim=True)
    wanted = [
        sum(float(unit[a, place] @ unit[b, place]) for a in range(4) for b in range(4) if a != b) / 12
        for place in range(6)
    ]
    assert torch.allclose(mean_cosines(states), torch.tensor(wanted), atol=1e-5)
    assert mean_cosines(states[:1]).tolist() == pytest.approx([0.0] * 6, abs=1e-6)


@pytest.mark.parametrize(("ratio", "merged"), [(0.04, 0.1), (0.162, 0.405), (0.16, 0.4), (0.25, 0.5)])
def test_stages(ratio: float, merged: float) -> None:
    outer, inner = make_method("prunevid").cuts(ModelFacts("llava", 32), ratio)
    assert (outer.layer, inner.layer, inner.ratio, inner.cache) == (0, 11, ratio, "all_layers")
    assert (outer.ratio, outer.renumber, inner.renumber) == (pytest.approx(merged, abs=0.003), True, False)
    (only,) = make_method("prunevid", {"alpha": 1}).cuts(ModelFacts("llava", 32), ratio)
    assert only.ratio == ratio


@pytest.mark.parametrize("renumber", [None, False])
def test_every_part_gives_its_share_in_both_stages(renumber: bool | None) -> None:
    """A video of one scene: 15 still places and 5 that move in each of 4 frames, 35 tokens once averaged."""
    signals = random_clips((4, 4, 5), (0, 3, 3), ratio=0.5, seed=1)
    moved, still = signals.hidden.clone(), scene(signals, noise=0.0).hidden
    for image in signals.clips[0]:
        columns = signals.visual[image.tokens]
        moved[columns[5:]] = still[columns[5:]]
    signals.hidden = moved
    parameters = {"tau": 0.99, "renumber": renumber, "alpha": 0.5}
    (_, first, merged), (now, second, kept) = every_stage("prunevid", signals, 0.15, **parameters)
    assert merged == [24, 3]
    assert first.merge is not None
    frames = (first.merge.to_dense()[:24, :80] > 0).view(24, 4, 20).any(dim=2).sum(dim=1)
    counts = apportion(24, [15, 5, 5, 5, 5], [15, 5, 5, 5, 5])
    assert int((frames == 4).sum()) == counts[0]
    # The second stage takes of each part its best.
    score = question_attention(now).tolist()
    part = (now.memory["part"][first.keep[:24]] - 1).tolist()
    assert [part.count(i) for i in range(5)] == counts
    assert [part[i] == 0 for i in range(24)] == (frames == 4).tolist()
    wanted: list[int] = []
    for number, count in enumerate(apportion(12, counts, counts)):
        members = [token for token in range(24) if part[token] == number]
        wanted += [members[i] for i in best([score[token] for token in members], count)]
    assert kept == [12, 1]
    assert second.keep[:12].tolist() == sorted(wanted)


def test_a_part_is_known_beside_tokens_that_a_wrapper_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage of `prunevid+ivc` asks each cluster's part for its share; coordinates beside them are one."""
    asked: list[list[int]] = []
    of_parts = Method.of_parts

    def watched(self: Method, score: torch.Tensor, part: torch.Tensor, budget: int) -> torch.Tensor:
        asked.append(part.tolist())
        return of_parts(self, score, part, budget)

    monkeypatch.setattr(Method, "of_parts", watched)
    signals = scene(random_clips((4, 4, 5), ratio=0.5, seed=1), noise=0.3)
    (_, first, _), (now, _, _) = every_stage("prunevid+ivc", signals, 0.15)
    assert asked
    assert len(first.keep) == now.n_visual == len(asked[0])
    noted = now.memory["part"][first.keep].tolist()
    assert all(part == noted for part in asked)
    assert 0 in noted, "some coordinates are no clusters"
    assert len(set(noted)) > 2


def test_the_released_counts_do_not_ask_for_the_ratio() -> None:
    for ratio in (0.1, 0.5):
        signals = random_clips((4, 4, 5), ratio=ratio, seed=2)
        selection = make_method("prunevid", {"counts": "released", "tau": 1.0}).select(signals)
        assert not selection.exact
        assert selection.keep.numel() == 40, "half of every frame"
