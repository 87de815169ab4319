"""Fast resampling says what one resample after the other says, whatever is resampled with it, in bounded memory."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from ivcp_eval.reports.stats import resampling
from ivcp_eval.reports.stats.resampling import Paired, Sums, paired_bootstrap, paired_bootstraps
from ivcp_eval.reports.stats.signflips import sign_flip_p


def reference(before, after, clusters, scale: float = 1, resamples: int = 4000, seed: int = 5):
    """The implementation before this one, cluster by cluster: (differences, retained, p) of a mean of scores."""
    _, ids = np.unique(clusters, return_inverse=True)
    n = ids.max() + 1
    sums = np.stack([np.bincount(ids, weights=values) for values in (before, after, np.ones(ids.size))], axis=1)
    generator = np.random.default_rng(seed)
    drawn = np.stack([sums[generator.integers(0, n, n)].sum(axis=0) for _ in range(resamples)])
    means = scale * drawn[:, :2] / drawn[:, 2:]
    moves = sums[:, 1] - sums[:, 0]
    flipped = np.array([abs(moves @ generator.choice((-1, 1), n)) for _ in range(resamples)])
    p_value = (1 + np.sum(flipped >= abs(moves.sum()) - 1e-9)) / (1 + resamples)
    return means[:, 1] - means[:, 0], means[:, 1] / means[:, 0], p_value


def counted_one_by_one(steps) -> float:
    """The distribution of the sum of all sign flips, one move after the other."""
    reach = int(np.abs(steps).sum())
    chances = np.ones(1)
    for step in np.abs(steps):
        grown = np.zeros(chances.size + 2 * step)
        grown[: chances.size] = chances / 2
        grown[2 * step :] += chances / 2
        chances = grown
    return min(1.0, float(chances[np.abs(np.arange(chances.size) - reach) >= abs(int(steps.sum()))].sum()))


def made(kind: str, n: int = 900, seed: int = 0):
    generator = np.random.default_rng(seed)
    clusters = {"alone": np.arange(n), "pairs": np.arange(n) // 2, "ragged": generator.integers(0, n // 12, n)}[
        kind.split()[1]
    ]
    if kind.startswith("verdicts"):
        before = (generator.random(n) < 0.7).astype(float)
        after = np.where(generator.random(n) < 0.1, generator.random(n) < 0.4, before).astype(float)
    else:
        before = generator.random(n)
        after = np.clip(before + generator.normal(-0.004, 0.1, n), 0, 1)
    return before, after, clusters


KINDS = [f"{scores} {clusters}" for scores in ("verdicts", "graded") for clusters in ("alone", "pairs", "ragged")]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_slow_reference_within_monte_carlo_error(kind: str) -> None:
    before, after, clusters = made(kind)
    result = paired_bootstrap(before, after, clusters, scale=100)
    differences, retained, p_value = reference(before, after, clusters, scale=100)
    # Four standard errors of a quantile at 2.5 % and of a share, from 4,000 resamples.
    quantile = 4 * math.sqrt(0.025 * 0.975 / 4000) / 0.0584
    assert result.standard_error == pytest.approx(differences.std(), rel=4 / math.sqrt(2 * 4000))
    for interval, values in ((result.difference_interval, differences), (result.retained_interval, retained)):
        assert interval.low == pytest.approx(np.quantile(values, 0.0245), abs=quantile * values.std())
        assert interval.high == pytest.approx(np.quantile(values, 0.9755), abs=quantile * values.std())
    assert result.p_value == pytest.approx(p_value, abs=4 * math.sqrt(max(p_value, 1e-3) / 4000))


def test_both_ways_of_drawing_are_used_and_agree(monkeypatch) -> None:
    before, after, clusters = made("verdicts pairs", 4000)
    one = Paired.of(before, after, clusters)
    assert one.kinds is not None
    assert Paired.of(*made("graded pairs")).kinds is None
    (by_kind,) = paired_bootstraps([one])
    monkeypatch.setattr(resampling, "_MOST_KINDS", 0)
    (by_cluster,) = paired_bootstraps([Paired.of(before, after, clusters)])
    assert by_cluster.standard_error == pytest.approx(by_kind.standard_error, rel=0.04)
    assert by_cluster.difference_interval != by_kind.difference_interval


def test_a_comparison_has_the_result_that_it_has_alone() -> None:
    asked = [made(kind, seed=seed) for seed, kind in enumerate(KINDS)]
    together = paired_bootstraps([Paired.of(*one) for one in asked], resamples=300)
    for one, result in zip(asked, together, strict=True):
        alone = paired_bootstrap(*one, resamples=300)
        assert result.difference_interval.low == pytest.approx(alone.difference_interval.low, rel=1e-12)
        assert (result.p_value, result.n_clusters, result.notes) == (alone.p_value, alone.n_clusters, alone.notes)


def test_a_ratio_of_sums_is_permuted_as_one_by_one() -> None:
    """A metric that is no mean, with too many kinds of clusters to draw by kind."""
    before, after, _ = made("graded alone", 300)
    weights = np.random.default_rng(1).random(300)
    sums = Sums(*(np.stack([weights * s, weights], axis=1) for s in (before, after)), lambda t: t[..., 0] / t[..., 1])
    generator = np.random.default_rng(2)
    observed = abs(weights @ (after - before))
    flipped = [abs((weights * (after - before)) @ generator.choice((-1, 1), 300)) for _ in range(6000)]
    expected = np.mean(np.array(flipped) >= observed)
    assert 0.01 < expected < 0.99
    assert paired_bootstrap(before, after, sums=sums).p_value == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("seed", range(12))
def test_all_sign_flips_are_counted(seed: int) -> None:
    generator = np.random.default_rng(seed)
    steps = generator.integers(-5, 7 - seed % 3, 11)
    flipped = [abs(int(np.dot(signs, steps))) for signs in itertools.product((-1, 1), repeat=11)]
    expected = np.mean(np.array(flipped) >= abs(int(steps.sum())))
    assert sign_flip_p(steps / 3) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "drift"), [(2000, 0.0), (2000, 0.3), (400, 0.95), (400, 1.0)])
def test_a_tail_far_out_is_as_exact_as_the_middle(n: int, drift: float) -> None:
    generator = np.random.default_rng(1)
    steps = generator.integers(1, 8, n) * np.where(generator.random(n) < (1 + drift) / 2, 1, -1)
    expected = counted_one_by_one(steps)
    assert sign_flip_p(steps.astype(float)) == pytest.approx(expected, rel=1e-8)
    assert drift < 0.3 or expected < 1e-20


def test_moves_without_a_common_part_are_not_counted() -> None:
    assert sign_flip_p(np.random.default_rng(0).normal(size=20)) is None
    assert sign_flip_p(np.zeros(5)) == 1


def test_memory_does_not_grow_with_the_resamples_times_the_samples() -> None:
    before, after, _ = made("graded alone", 20_000)
    one = Paired.of(before, after)
    tracemalloc.start()
    paired_bootstraps([one], resamples=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 110e6, "a whole matrix of draws takes 160 MB"
