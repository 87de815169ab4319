"""Statistics against known values, slow independent references and simulations."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ivcp_eval.reports import stats


def make_scores(n: int, n_clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """0/1 scores whose clusters share their difficulty, so that clustering matters."""
    generator = np.random.default_rng(seed)
    clusters = generator.integers(0, n_clusters, n)
    difficulty = generator.random(n_clusters)[clusters]
    baseline = (generator.random(n) < difficulty).astype(float)
    pruned = np.where(generator.random(n) < 0.15, generator.random(n) < 0.3 * difficulty, baseline).astype(float)
    return baseline, pruned, clusters


def slow_bootstrap(baseline, pruned, clusters, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Differences and ratios of resampled means with dicts, lists and Python's own generator."""
    generator = random.Random(7)
    members: dict[int, list[tuple[float, float]]] = {}
    for before, after, cluster in zip(baseline, pruned, clusters, strict=True):
        members.setdefault(int(cluster), []).append((before, after))
    names = sorted(members)
    differences, ratios = [], []
    for _ in range(resamples):
        pairs = [pair for name in generator.choices(names, k=len(names)) for pair in members[name]]
        before, after = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
        differences.append(after - before)
        ratios.append(after / before)
    return np.array(differences), np.array(ratios)


def mean_of(before: np.ndarray, after: np.ndarray, scale: float = 1) -> stats.Sums:
    """The mean, said as a ratio of two sums."""
    terms = [np.stack([scores, np.ones(scores.size)], axis=1) for scores in (before, after)]
    return stats.Sums(terms[0], terms[1], lambda totals: scale * totals[..., 0] / totals[..., 1])


class TestPairedBootstrap:
    def test_equals_a_slow_independent_bootstrap(self):
        baseline, pruned, clusters = make_scores(300, 60)
        differences, ratios = slow_bootstrap(baseline, pruned, clusters, 4000)
        result = stats.paired_bootstrap(baseline, pruned, clusters)
        assert result.standard_error == pytest.approx(differences.std(), rel=0.05)
        # 60 clusters: the expansion moves the tail from 2.5 % to 2.2 %, as Hesterberg's formula says.
        tail = scipy_stats.norm.cdf(-math.sqrt(60 / 59) * scipy_stats.t.ppf(0.975, 59))
        assert 0.021 < tail < 0.0225
        for interval, values in ((result.difference_interval, differences), (result.retained_interval, ratios)):
            low, high = np.quantile(values, [tail, 1 - tail])
            assert interval.low == pytest.approx(low, abs=0.1 * (high - low))
            assert interval.high == pytest.approx(high, abs=0.1 * (high - low))

    def test_point_estimates_are_exact(self):
        result = stats.paired_bootstrap([1, 1, 0, 1], [1, 0, 0, 1], scale=100, resamples=50)
        assert (result.baseline, result.pruned, result.difference) == (75, 50, -25)
        assert result.retained == pytest.approx(2 / 3)
        assert (result.n_samples, result.n_clusters) == (4, 4)

    def test_a_constant_difference_has_no_spread_whatever_the_sizes_of_clusters(self):
        clusters = np.repeat(np.arange(12), np.arange(1, 13))
        result = stats.paired_bootstrap(np.ones(78), np.full(78, 0.5), clusters, resamples=200)
        assert (result.difference_interval.low, result.difference_interval.high) == (-0.5, -0.5)

    def test_standard_error_is_the_analytic_clustered_one(self):
        baseline, pruned, clusters = make_scores(2000, 150, seed=3)
        difference = pruned - baseline
        residual = np.bincount(clusters, weights=difference - difference.mean())
        analytic = math.sqrt((residual**2).sum()) / difference.size
        assert stats.paired_bootstrap(baseline, pruned, clusters).standard_error == pytest.approx(analytic, rel=0.03)

    def test_copies_of_a_sample_in_one_cluster_add_no_certainty(self):
        baseline, pruned, _ = make_scores(80, 80, seed=1)
        alone = stats.paired_bootstrap(baseline, pruned, seed=5)
        copied = stats.paired_bootstrap(
            np.repeat(baseline, 9), np.repeat(pruned, 9), np.repeat(np.arange(80), 9), seed=5
        )
        assert copied.difference_interval.low == pytest.approx(alone.difference_interval.low)
        assert copied.p_value == pytest.approx(alone.p_value)
        ignored = stats.paired_bootstrap(np.repeat(baseline, 9), np.repeat(pruned, 9), seed=5)
        assert ignored.standard_error == pytest.approx(alone.standard_error / 3, rel=0.05)

    def test_pairing_is_narrower_than_totals(self):
        baseline, pruned, _ = make_scores(1000, 1000, seed=2)
        paired = stats.paired_bootstrap(baseline, pruned, resamples=2000).difference_interval
        totals = stats.unpaired_interval(baseline.mean(), 1000, pruned.mean(), 1000).difference_interval
        assert paired.high - paired.low < 0.7 * (totals.high - totals.low)

    def test_covers_the_truth_with_few_clusters(self):
        generator = np.random.default_rng(11)
        covered, plain = 0, 0
        for trial in range(400):
            difference = generator.normal(0.3, 1, 8)
            result = stats.paired_bootstrap(np.zeros(8), difference, resamples=800, seed=trial)
            covered += result.difference_interval.low <= 0.3 <= result.difference_interval.high
            means = generator.choice(difference, (800, 8)).mean(axis=1)
            low, high = np.quantile(means, [0.025, 0.975])
            plain += low <= 0.3 <= high
        assert 0.92 <= covered / 400 <= 0.98
        assert plain / 400 < 0.92, "plain percentiles are too narrow here; else this test proves nothing"

    def test_the_path_over_sums_agrees_with_the_mean(self):
        baseline, pruned, clusters = make_scores(200, 40, seed=4)
        fast = stats.paired_bootstrap(baseline, pruned, clusters, scale=100)
        general = stats.paired_bootstrap(baseline, pruned, clusters, sums=mean_of(baseline, pruned, 100))
        assert general.difference == fast.difference
        assert general.difference_interval == fast.difference_interval
        assert general.p_value == pytest.approx(fast.p_value, abs=0.03)

    def test_a_ratio_of_sums_equals_a_slow_bootstrap(self):
        """A metric that is no mean of scores (recall), every resample built sample by sample."""
        generator = np.random.default_rng(3)
        clusters = generator.integers(0, 25, 120)
        weights = generator.integers(1, 4, 120).astype(float)
        hits = [(generator.random(120) < share).astype(float) for share in (0.8, 0.6)]
        terms = [np.stack([weights * h, weights], axis=1) for h in hits]
        sums = stats.Sums(*terms, combine=lambda totals: 100 * totals[..., 0] / totals[..., 1])
        result = stats.paired_bootstrap(*hits, clusters, sums=sums, resamples=20_000)
        rows = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
        differences = []
        for _ in range(4000):
            drawn = np.concatenate([rows[c] for c in generator.integers(0, len(rows), len(rows))])
            scores = [100 * np.average(h[drawn], weights=weights[drawn]) for h in hits]
            differences.append(scores[1] - scores[0])
        assert result.standard_error == pytest.approx(np.std(differences), rel=0.04)
        assert result.difference == pytest.approx(100 * np.average(hits[1] - hits[0], weights=weights))
        extreme = []
        for _ in range(4000):
            swap = generator.integers(0, 2, len(rows)).astype(bool)[np.unique(clusters, return_inverse=True)[1]]
            one, other = np.where(swap, hits[1], hits[0]), np.where(swap, hits[0], hits[1])
            extreme.append(abs(100 * np.average(other - one, weights=weights)) >= abs(result.difference) - 1e-9)
        assert result.p_value == pytest.approx(np.mean(extreme), abs=0.01)

    @pytest.mark.parametrize("general", [False, True])
    def test_permutation_test_equals_full_enumeration(self, general: bool):
        difference = np.array([0.9, 0.1, -0.3, 0.7, 0.4, -0.1, 0.5, 0.2])
        extreme = sum(
            abs(np.dot(signs, difference)) >= abs(difference.sum()) - 1e-12
            for signs in itertools.product((-1, 1), repeat=8)
        )
        sums = mean_of(np.zeros(8), difference) if general else None
        result = stats.paired_bootstrap(np.zeros(8), difference, sums=sums, resamples=6000)
        assert result.p_value == pytest.approx(extreme / 2**8, abs=0.012 if general else 1e-12)

    @pytest.mark.parametrize("parts", [1, 3, 100])
    def test_permutations_of_scores_with_a_common_part_are_all_counted(self, parts: int):
        generator = np.random.default_rng(parts)
        before, after = (generator.integers(0, parts + 1, 40) / parts for _ in range(2))
        clusters = np.arange(40) % 12
        moves = [sum((after - before)[clusters == c]) for c in range(12)]
        extreme = sum(
            abs(sum(s * m for s, m in zip(signs, moves, strict=True))) >= abs(sum(moves)) - 1e-9
            for signs in itertools.product((-1, 1), repeat=12)
        )
        result = stats.paired_bootstrap(before, after, clusters, resamples=20)
        assert result.p_value == pytest.approx(extreme / 2**12, rel=1e-9)

    def test_verdicts_of_single_samples_give_mcnemars_p_value(self):
        before, after = [1] * 150 + [0] * 150, [1] * 110 + [0] * 40 + [1] * 9 + [0] * 141
        result = stats.paired_bootstrap(before, after, resamples=20)
        assert result.p_value == pytest.approx(stats.mcnemar(before, after).p_value, rel=1e-9)
        assert result.p_value < 1e-5, "however few resamples: thousands of comparisons are corrected for"

    def test_scores_without_a_common_part_are_permuted_at_random(self):
        difference = np.random.default_rng(0).normal(1, 1, 30)
        result = stats.paired_bootstrap(np.zeros(30), difference, resamples=99)
        assert result.p_value == pytest.approx(1 / 100)

    def test_is_deterministic_and_follows_the_seed(self):
        scores = make_scores(100, 30)
        one, two, other = (stats.paired_bootstrap(*scores, resamples=500, seed=seed) for seed in (1, 1, 2))
        assert one == two
        assert one.difference_interval != other.difference_interval

    def test_order_of_samples_does_not_matter(self):
        baseline, pruned, clusters = make_scores(100, 30)
        order = np.random.default_rng(0).permutation(100)
        one = stats.paired_bootstrap(baseline, pruned, clusters, resamples=500)
        two = stats.paired_bootstrap(baseline[order], pruned[order], clusters[order], resamples=500)
        assert two.difference_interval.low == pytest.approx(one.difference_interval.low)
        assert two.p_value == one.p_value

    def test_one_cluster_has_no_interval_and_says_so(self):
        result = stats.paired_bootstrap([1, 0, 1], [0, 0, 1], ["same image"] * 3)
        assert result.difference == pytest.approx(-1 / 3)
        assert not result.difference_interval.defined
        assert not result.retained_interval.defined
        assert math.isnan(result.p_value)
        assert any("one cluster" in note for note in result.notes)

    def test_no_difference_at_all_is_not_certainty(self):
        result = stats.paired_bootstrap([1, 0, 1, 1] * 25, [1, 0, 1, 1] * 25, resamples=200)
        assert (result.difference_interval.low, result.difference_interval.high) == (0, 0)
        assert result.p_value == 1
        assert any("0.03 of all clusters" in note for note in result.notes)

    def test_zero_baseline_leaves_retained_undefined(self):
        result = stats.paired_bootstrap([0] * 30, [0, 1] * 15, resamples=200)
        assert math.isnan(result.retained)
        assert not result.retained_interval.defined
        assert result.difference_interval.low > 0
        assert any("zero" in note for note in result.notes)

    def test_a_baseline_that_can_be_zero_has_no_ratio_interval(self):
        result = stats.paired_bootstrap([1, 0, 0, 0], [1, 1, 0, 0], resamples=500)
        assert result.retained == 2
        assert not result.retained_interval.defined
        assert any("resamples" in note for note in result.notes)

    def test_a_constant_ratio_is_exact(self):
        baseline = np.linspace(0.1, 1, 40)
        result = stats.paired_bootstrap(baseline, 0.5 * baseline, resamples=300)
        assert result.retained_interval.low == pytest.approx(0.5)
        assert result.retained_interval.high == pytest.approx(0.5)

    @pytest.mark.parametrize(
        ("baseline", "pruned", "clusters", "level", "said"),
        [
            ([], [], None, 0.95, "no samples"),
            ([1, 0], [1], None, 0.95, "one length"),
            ([1, 0], [1, 0], ["a"], 0.95, "one length"),
            ([1, math.nan], [1, 0], None, 0.95, "finite"),
            ([1, 0], [1, 0], None, 95, "level"),
        ],
    )
    def test_refuses(self, baseline, pruned, clusters, level, said):
        with pytest.raises(ValueError, match=said):
            stats.paired_bootstrap(baseline, pruned, clusters, level=level)


class TestTestsAndFlips:
    def test_mcnemar_known_value(self):
        baseline = [1] * 15 + [0] * 5 + [1] * 40
        pruned = [0] * 15 + [1] * 5 + [1] * 40
        result = stats.mcnemar(baseline, pruned)
        assert (result.right_to_wrong, result.wrong_to_right) == (15, 5)
        # 2 * sum of C(20, k) for k <= 5, over 2^20.
        assert result.p_value == pytest.approx(2 * 21700 / 2**20)

    def test_mcnemar_without_a_change(self):
        assert stats.mcnemar([1, 0], [1, 0]).p_value == 1

    def test_mcnemar_refuses_graded_scores(self):
        with pytest.raises(ValueError, match="0 and 1"):
            stats.mcnemar([0.3, 1], [1, 1])

    def test_flips(self):
        found = stats.flips([1, 0, 1, 0], [0, 1, 1, 0], ["a", "b", "c", "d"], ["x", "y", "c ", "e"])
        assert (found.right_to_wrong, found.wrong_to_right, found.answers_changed, found.n) == (1, 1, 3, 4)
        assert not found.graded
        assert stats.flips([0.3], [0.6], ["a"], ["a"]).graded
        with pytest.raises(ValueError, match="length"):
            stats.flips([1], [1, 0], ["a"], ["a"])


class TestUnpaired:
    def test_newcombe_1998_published_example(self):
        # Newcombe 1998, table II (a): 56/70 against 48/80, method 10.
        result = stats.unpaired_interval(48 / 80, 80, 56 / 70, 70)
        assert result.difference == pytest.approx(0.2)
        assert result.difference_interval.low == pytest.approx(0.0524, abs=5e-5)
        assert result.difference_interval.high == pytest.approx(0.3339, abs=5e-5)

    def test_p_value_is_that_of_the_chi_square_test(self):
        table = [[48, 32], [56, 14]]
        expected = scipy_stats.chi2_contingency(table, correction=False).pvalue
        assert stats.unpaired_interval(0.6, 80, 0.8, 70).p_value == pytest.approx(expected)

    def test_ratio_is_scipys_relative_risk(self):
        risk = scipy_stats.contingency.relative_risk(56, 70, 48, 80)
        result = stats.unpaired_interval(60, 80, 80, 70, scale=100)
        assert result.retained == pytest.approx(risk.relative_risk)
        known = risk.confidence_interval(0.95)
        assert (result.retained_interval.low, result.retained_interval.high) == pytest.approx((known.low, known.high))

    def test_scale(self):
        small, large = (stats.unpaired_interval(s * 0.6, 50, s * 0.5, 50, scale=s) for s in (1, 100))
        assert large.difference_interval.low == pytest.approx(100 * small.difference_interval.low)
        assert large.standard_error == pytest.approx(100 * small.standard_error)
        assert large.p_value == pytest.approx(small.p_value)

    def test_edges(self):
        zero = stats.unpaired_interval(0, 10, 0.5, 10)
        assert math.isnan(zero.retained)
        assert not zero.retained_interval.defined
        assert zero.difference_interval.defined
        assert stats.unpaired_interval(1, 10, 1, 10).p_value == 1
        with pytest.raises(ValueError, match="numbers of samples"):
            stats.unpaired_interval(0.5, 0, 0.5, 10)
        with pytest.raises(ValueError, match=r"\[0, 100\]"):
            stats.unpaired_interval(101.3, 10, 90, 10, scale=100)


class TestCorrections:
    def test_holm_by_hand(self):
        adjusted = stats.holm([0.01, 0.04, math.nan, 0.03, 0.005])
        assert adjusted == pytest.approx([0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True)

    def test_benjamini_hochberg_is_scipys(self):
        values = np.random.default_rng(0).random(30) ** 3
        assert stats.benjamini_hochberg(values) == pytest.approx(scipy_stats.false_discovery_control(values))
        with_hole = stats.benjamini_hochberg([*values, math.nan])
        assert with_hole[:-1] == pytest.approx(scipy_stats.false_discovery_control(values))
        assert math.isnan(with_hole[-1])

    def test_never_above_one_and_empty(self):
        assert stats.holm([0.9, 0.8]).max() == 1
        assert stats.holm([]).size == 0
        assert stats.benjamini_hochberg([math.nan]).size == 1


class TestPower:
    @pytest.mark.parametrize(("n", "points"), [(951, 2.9), (1000, 2.8), (2017, 2.0), (9000, 0.9)])
    def test_published_sizes_at_ten_percent_discordance(self, n: int, points: float):
        error = stats.discordance_standard_error(0.1, n)
        assert 100 * stats.minimal_detectable_effect(error) == pytest.approx(points, abs=0.06)

    def test_the_effect_is_found_with_the_stated_power(self):
        effect = stats.minimal_detectable_effect(1.0)
        drawn = np.random.default_rng(0).normal(effect, 1, 20000)
        assert np.mean(np.abs(drawn) > 1.96) == pytest.approx(0.8, abs=0.01)

    def test_nothing_varied(self):
        assert math.isnan(stats.minimal_detectable_effect(0.0))
