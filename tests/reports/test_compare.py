"""Comparisons: joining, pairing, refusals, and a table that says what it does not know."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ivcp_eval import cli
from ivcp_eval.benchmarks import data_file, headline
from ivcp_eval.benchmarks.agreement import BOX_METRICS, TEXT_METRICS, agreement
from ivcp_eval.benchmarks.published import AVERAGES
from ivcp_eval.reports import stats
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.provenance import PLACED, Selection, variant_key
from ivcp_eval.reports.table import make_row, read_results, write_results, write_samples
from ivcp_eval.reports.terminal import LOUD

BASELINES = Path(__file__).parents[2] / "results" / "baselines"
N = 60
#: Column of `PLACED` -> two of its values.
WAYS = {
    **{"dtype": ("float32", "bfloat16"), "attention": ("sdpa", "eager"), "device": ("cpu", "H100")},
    "video": ("8 frames", "16 frames"),
}


def make(method: str = "none", **values):
    ratio = 1.0 if method == "none" else 0.5
    own = {
        "model": "qwen25",
        "benchmark": "dev",
        "metric": "accuracy",
        "method": method,
        "ratio_asked": ratio,
        "ratio_kept_final": ratio,
        "ratio_layer_mean": (1 + ratio) / 2,
        "ratio_kv_cache": ratio,
        "status": "ok",
        "score": 80.0,
        "score_scale": 100,
        "n_samples": N,
        "run_id": f"run-{method}",
        "judge": "exact_matching",
        "vlmeval_version": "ms-vlmeval 0.0.20",
        "prompt_sha256": "a" * 64,
        "benchmark_sha256": "b" * 64,
        "max_pixels": 1000,
        "trained_weights": True,
        "device": "cpu",
        "dtype": "float32",
        "attention": "sdpa",
    }
    if values.get("source"):
        own = {name: own[name] for name in ("model", "benchmark", "metric", "method", "status", "score", "score_scale")}
    return make_row(**{**own, **values})


def samples(scores, *, answers="yes", start: int = 0, **values):
    return [
        {"index": i + start, "cluster": i // 2, "prediction": f"{score}", "answer": answers, "score": score, **values}
        for i, score in enumerate(scores)
    ]


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    """48 of 60 right; pruned loses ten of them and gains four."""
    baseline = np.array([1.0] * 48 + [0.0] * 12)
    pruned = baseline.copy()
    pruned[:10], pruned[-4:] = 0, 1
    return baseline, pruned


@pytest.fixture
def folder(tmp_path, scores) -> Path:
    """results.csv with an unpruned and a pruned row and their per-sample files."""
    write_samples(tmp_path / "runs" / "none.csv", samples(scores[0]))
    write_samples(tmp_path / "runs" / "ivc.csv", samples(scores[1]))
    rows = [
        make(predictions="runs/none.csv", prefill_ms_median=200, decode_ms_per_token_median=10),
        make("ivc_prune", score=70.0, predictions="runs/ivc.csv", prefill_ms_median=150, decode_ms_per_token_median=9),
    ]
    write_results(tmp_path / "results.csv", rows)
    return tmp_path


def write(folder: Path, *rows, name: str = "results.csv") -> Path:
    write_results(folder / name, rows)
    return folder / name


class TestPaired:
    def test_against_the_files_own_baseline(self, folder, scores):
        (row,) = compare(folder / "results.csv").rows
        expected = stats.paired_bootstrap(*scores, np.arange(N) // 2, scale=100)
        assert row.paired
        assert (row.score_baseline, row.score_pruned, row.difference) == (80, 70, -10)
        assert row.retained_percent == 87.5
        assert (row.right_to_wrong, row.wrong_to_right, row.answers_changed) == (10, 4, 14)
        assert (row.n_samples, row.n_clusters, row.test) == (N, N // 2, "permutation")
        width = expected.difference_interval.high - expected.difference_interval.low
        assert row.difference_low == pytest.approx(expected.difference_interval.low, abs=0.08 * width)
        assert row.difference_high == pytest.approx(expected.difference_interval.high, abs=0.08 * width)
        assert row.p_value == pytest.approx(expected.p_value, abs=0.02)
        assert row.minimal_detectable_effect == pytest.approx(2.8 * row.standard_error, rel=0.01)
        assert all(time.n == 0 for time in row.times.values()), "unpaired medians are no measure of speed"
        assert row.notes == ()

    def test_flips_of_several_seeds_are_those_of_a_seed_on_average(self, folder, scores):
        """Ten lost and four gained in one seed, two lost in the other: six and two, not the union."""
        other = scores[0].copy()
        other[20:22] = 0
        write_samples(folder / "runs" / "other.csv", samples(other))
        seeds = [
            make("random", seed=0, score=70.0, predictions="runs/ivc.csv"),
            make("random", seed=1, score=100 * other.mean(), run_id="other", predictions="runs/other.csv"),
        ]
        (row,) = compare(write(folder, make(predictions="runs/none.csv"), *seeds)).rows
        assert (row.n_seeds, row.right_to_wrong, row.wrong_to_right, row.graded) == (2, 6, 2, False)
        assert row.difference == pytest.approx(100 * (2 - 6) / N)
        other[30] = 0
        write_samples(folder / "runs" / "other.csv", samples(other))
        seeds[1]["score"] = 100 * other.mean()
        (row,) = compare(write(folder, make(predictions="runs/none.csv"), *seeds)).rows
        assert row.right_to_wrong == 6.5
        assert "6.5 / 2.0" in compare(folder / "results.csv").to_terminal(999)

    def test_mcnemar_for_independent_verdicts(self, folder, scores):
        for name, values in zip(("none", "ivc"), scores, strict=True):
            write_samples(folder / "runs" / f"{name}.csv", [{**row, "cluster": ""} for row in samples(values)])
        (row,) = compare(folder / "results.csv").rows
        assert row.test == "McNemar"
        assert row.p_value == stats.mcnemar(*scores).p_value
        assert row.n_clusters == N

    def test_order_of_samples_and_rows_does_not_matter(self, folder, scores):
        before = compare(folder / "results.csv").rows
        write_samples(folder / "runs" / "ivc.csv", samples(scores[1])[::-1])
        other = make("fastv", score=70.0, predictions="runs/ivc.csv", run_id="f")
        rows = [other, make("ivc_prune", score=70.0, predictions="runs/ivc.csv"), make(predictions="runs/none.csv")]
        after = compare(write(folder, *rows)).rows[1]
        assert (after.difference_low, after.p_value) == (before[0].difference_low, before[0].p_value)

    def test_two_files(self, folder):
        elsewhere = folder / "other" / "base.csv"
        (folder / "other" / "runs").mkdir(parents=True)
        (folder / "other" / "runs" / "none.csv").write_bytes((folder / "runs" / "none.csv").read_bytes())
        write_results(elsewhere, [make(predictions="runs/none.csv")])
        write(folder, make("ivc_prune", score=70.0, predictions="runs/ivc.csv"))
        comparison = compare(folder / "results.csv", elsewhere)
        assert comparison.rows[0].paired
        assert str(elsewhere) in comparison.to_terminal()

    def test_holm_over_all_rows(self, folder):
        methods = ("ivc_prune", "fastv", "random")
        rows = [make(m, score=70.0, predictions="runs/ivc.csv", run_id=m) for m in methods]
        compared = compare(write(folder, make(predictions="runs/none.csv"), *rows)).rows
        assert [row.p_holm for row in compared] == pytest.approx(stats.holm([row.p_value for row in compared]).tolist())
        assert max(row.p_holm for row in compared) > max(row.p_value for row in compared)

    def test_samples_without_a_score_leave_both_sides(self, folder, scores):
        baseline = [*scores[0], math.nan]
        pruned = [*scores[1], 1.0]
        write_samples(folder / "runs" / "none.csv", samples(baseline))
        write_samples(folder / "runs" / "ivc.csv", samples(pruned))
        (row,) = compare(folder / "results.csv").rows
        assert row.paired
        assert row.n_samples == N
        assert any("1 samples without a score" in note for note in row.notes)

    def test_circular_questions(self, tmp_path):
        """Twenty questions of two rotations each; one wrong rotation makes the question wrong."""

        def rotations(wrong):
            rows = []
            for question in range(20):
                for turn in range(2):
                    index = question + 1_000_000 * turn
                    rows.append(
                        {"index": index, "cluster": index, "score": float(index not in wrong), "prediction": ""}
                    )
            return rows

        write_samples(tmp_path / "none.csv", rotations({0}))
        write_samples(tmp_path / "ivc.csv", rotations({0, 1_000_000, 3, 1_000_007}))
        name = {"benchmark": "MMBench_DEV_EN_V11"}
        rows = [make(score=95.0, predictions="none.csv", **name)]
        rows += [make("ivc_prune", score=85.0, predictions="ivc.csv", **name)]
        (row,) = compare(write(tmp_path, *rows), resamples=500).rows
        assert row.paired
        assert (row.n_samples, row.n_clusters) == (40, 20)
        assert row.difference_low < -10 < row.difference_high


class TestUnpaired:
    def test_totals_only(self, folder):
        rows = [make(), make("ivc_prune", score=70.0)]
        comparison = compare(write(folder, *rows))
        (row,) = comparison.rows
        known = stats.unpaired_interval(80, N, 70, N, scale=100)
        assert not row.paired
        assert (row.difference_low, row.difference_high) == (
            known.difference_interval.low,
            known.difference_interval.high,
        )
        assert row.right_to_wrong is None
        assert "unpaired: totals only" in row.notes
        assert "unpaired" in comparison.to_terminal()
        assert "Unpaired: 1 of 1 rows" in comparison.to_terminal()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda f: (f / "runs" / "none.csv").unlink(), r"none\.csv is missing"),
            (
                lambda f: write_samples(f / "runs" / "none.csv", samples([1.0] * N, start=1)),
                "not the same samples: 1 only",
            ),
            (lambda f: write_samples(f / "runs" / "none.csv", samples([1.0] * N)), "give 100, not the reported 80"),
            (lambda f: write_samples(f / "runs" / "none.csv", samples([math.nan] * N)), "no sample has a score"),
        ],
    )
    def test_why_not_paired(self, folder, change, said):
        change(folder)
        (row,) = compare(folder / "results.csv").rows
        assert not row.paired
        assert not math.isnan(row.difference_low)
        assert any(re.search(f"^unpaired: .*{said}", note) for note in row.notes)

    def test_a_category_is_compared_on_its_own_samples(self, folder, scores):
        for name, values in zip(("none", "ivc"), scores, strict=True):
            rows = [{**row, "category": "Colour" if i < 20 else "shape"} for i, row in enumerate(samples(values))]
            write_samples(folder / "runs" / f"{name}.csv", rows)
        rows = [make(metric="colour", score=100.0, predictions="runs/none.csv")]
        rows += [make("ivc_prune", metric="colour", score=50.0, predictions="runs/ivc.csv")]
        (row,) = compare(write(folder, *rows)).rows
        assert row.paired
        assert (row.n_samples, row.right_to_wrong, row.wrong_to_right) == (20, 10, 0)

    def test_other_metrics_of_boxes_are_paired_by_their_overlap(self, folder):
        overlaps = {"none": [0.9] * 30 + [0.6] * 30, "ivc": [0.9] * 12 + [0.7] * 18 + [0.6] * 27 + [0.8] * 3}
        for name, values in overlaps.items():
            rows = [{**row, "iou": iou} for row, iou in zip(samples([1.0] * N), values, strict=True)]
            write_samples(folder / "runs" / f"{name}.csv", rows)
        stated = {"Acc@0.5": (100, 100), "Acc@0.75": (50, 25), "mean_iou": (75, 70)}
        rows = []
        for metric, (before, after) in stated.items():
            rows.append(make(metric=metric, score=before, predictions="runs/none.csv"))
            rows.append(make("ivc_prune", metric=metric, score=after, predictions="runs/ivc.csv"))
        found = {row.metric: row for row in compare(write(folder, *rows)).rows}
        assert all(row.paired for row in found.values())
        assert [(row.right_to_wrong, row.wrong_to_right) for row in found.values()] == [(0, 0), (18, 3), (18, 3)]
        assert [row.graded for row in found.values()] == [False, False, True]

    @pytest.mark.parametrize("boxes", [False, True])
    def test_every_metric_of_agreement_is_paired(self, folder, boxes):
        """Half of the answers say the same in other words, or move the box by half its width."""
        before = {str(i): f"[0, {i / N}, 0.5, 1]" for i in range(N)}
        now = {index: text if int(index) % 2 else f"[0.25, {text[4:-8]}, 0.75, 1]" for index, text in before.items()}
        rows = []
        for method, given in (("none", before), ("ivc_prune", now)):
            found = agreement(given, before, boxes)
            own = {"score": found.samples, "similarity": found.similarities, "iou": found.ious}
            lines = [
                {**row, **{name: values.get(str(row["index"])) for name, values in own.items()}}
                for row in samples([0.0] * N)
            ]
            write_samples(folder / "runs" / f"{method}.csv", lines)
            for metric, score in found.metrics.items():
                rows.append(make(method, metric=metric, score=score, predictions=f"runs/{method}.csv"))
        found = {row.metric: row for row in compare(write(folder, *rows)).rows}
        assert found.keys() == {*(BOX_METRICS if boxes else TEXT_METRICS)}
        assert all(row.paired and row.right_to_wrong == N // 2 for row in found.values())

    def test_a_metric_that_samples_do_not_determine(self, folder):
        rows = [
            make(metric="mean_iou", score=0.71, score_scale=1, predictions="runs/none.csv"),
            make("ivc_prune", metric="mean_iou", score=0.66, score_scale=1, predictions="runs/ivc.csv"),
        ]
        (row,) = compare(write(folder, *rows)).rows
        assert not row.paired
        assert row.right_to_wrong is None

    def test_a_sum_has_no_interval_from_totals(self, folder):
        rows = [make(benchmark="MME", score=2300, score_scale=2800, n_samples=2374)]
        rows += [make("ivc_prune", benchmark="MME", score=2250, score_scale=2800, n_samples=2374)]
        comparison = compare(write(folder, *rows))
        assert math.isnan(comparison.rows[0].difference_low)
        assert any("not a mean of shares" in note for note in comparison.rows[0].notes)
        assert "[none] unpaired" in comparison.to_terminal()
        assert "No row could be tested" in comparison.to_terminal()

    def test_a_broken_sample_file_is_no_reason_to_go_on(self, folder):
        (folder / "runs" / "ivc.csv").write_text("index,score\n1,1\n")
        with pytest.raises(ValueError, match=r"ivc\.csv lacks the column"):
            compare(folder / "results.csv")


class TestPublished:
    def test_a_reproduction_against_the_paper(self, tmp_path):
        name = {"benchmark": "RefCOCO_testA", "metric": "Acc@0.5", "n_samples": 5657}
        results = write(tmp_path, make(score=92.0, **name), make("ivc_prune", score=91.8, **name))
        comparison = compare(results, BASELINES / "ivc_prune_paper.csv")
        unpruned, pruned = comparison.rows
        assert (unpruned.method, unpruned.score_baseline) == ("none", 92.2)
        assert (pruned.method, pruned.score_baseline) == ("ivc_prune", 92.2)
        assert not pruned.paired
        assert "arXiv 2602.03060" in pruned.baseline_source
        assert any("5657 assumed" in note for note in pruned.notes)
        assert any("not stated by the published row: judge, vlmeval_version" in note for note in pruned.notes)
        same = compare(results, BASELINES / "ivc_prune_paper.csv", against="same_method").rows
        assert [(row.method, row.score_baseline) for row in same] == [("none", 92.2), ("ivc_prune", 92.0)]

    def test_published_against_published(self):
        path = BASELINES / "angelslim_qwen25.csv"
        comparison = compare(path)
        assert len(comparison.rows) == 18 * 11
        assert all(math.isnan(row.p_value) for row in comparison.rows)
        assert "Mean retained, qwen25 idpruner 0.25: 95.2 % over 11 benchmarks." in comparison.to_terminal()

    def test_another_harness_is_refused(self, tmp_path):
        results = write(tmp_path, make("ivc_prune", benchmark="MMStar", score=60.0))
        with pytest.raises(ValueError, match="vlmeval_version: baseline lmms-eval, not VLMEvalKit, results ms-vlmeval"):
            compare(results, BASELINES / "angelslim_qwen25.csv")


def test_every_way_of_computing_is_known():
    assert {*WAYS} == {*PLACED}


class TestRefusals:
    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("judge", "gpt-4o-mini@2024-07-18"),
            ("vlmeval_version", "vlmeval e8e78f0"),
            ("prompt_sha256", "c" * 64),
            ("min_pixels", 3136),
            ("max_pixels", None),
            ("max_new_tokens", 64),
            ("benchmark_sha256", "d" * 64),
            ("revision", "other"),
            ("trained_weights", False),
        ],
    )
    def test_different_settings(self, folder, column, value):
        unlike = make("ivc_prune", score=70.0, predictions="runs/ivc.csv", **{column: value})
        write(folder, make(predictions="runs/none.csv"), unlike)
        with pytest.raises(ValueError, match=f"(?s)dev accuracy ivc_prune 0.5: {column}: baseline .*force"):
            compare(folder / "results.csv")
        forced = compare(folder / "results.csv", force=True)
        assert forced.rows[0].paired
        assert (
            f"FORCED although settings differ: qwen25 dev accuracy ivc_prune 0.5: {column}: baseline"
            in forced.to_terminal(999)
        )
        assert f"differs, forced: {column}" in forced.to_frame()["notes"][0]

    def test_every_difference_is_named(self, folder):
        unlike = make("ivc_prune", score=70.0, judge="x", max_pixels=7)
        write(folder, make(), unlike)
        with pytest.raises(ValueError, match=r"(?s)judge: baseline exact_matching, results x.*max_pixels: .*1000.*7"):
            compare(folder / "results.csv")

    @pytest.mark.parametrize(
        ("what", "said"),
        [({"answers": "no", "prompt_sha256": "f" * 64}, "true answers"), ({"prompt_sha256": "e" * 64}, "prompts")],
    )
    def test_other_questions_under_the_same_index(self, folder, scores, what, said):
        write_samples(folder / "runs" / "none.csv", samples(scores[0], prompt_sha256="f" * 64))
        write_samples(folder / "runs" / "ivc.csv", samples(scores[1], **what))
        with pytest.raises(ValueError, match=f"{said} of 60 of 60 samples differ"):
            compare(folder / "results.csv")

    def test_what_may_differ_is_remarked(self, folder):
        other = make("ivc_prune", score=70.0, device="NVIDIA H100", prefill_ms_median=1)
        write(folder, make(prefill_ms_median=2), other)
        (row,) = compare(folder / "results.csv").rows
        assert "differs: device: baseline cpu, results NVIDIA H100" in row.notes

    def test_scales(self, folder):
        write(folder, make(), make("ivc_prune", score=0.7, score_scale=1))
        with pytest.raises(ValueError, match="scales of the scores differ, 100 and 1"):
            compare(folder / "results.csv", force=True)

    def test_of_several_baselines_the_alike_one_is_taken(self, folder):
        small = make(max_pixels=500, score=60.0, run_id="small")
        write(folder, small, make(), make("ivc_prune", score=70.0))
        assert compare(folder / "results.csv").rows[0].score_baseline == 80

    def test_a_row_is_compared_with_the_baseline_of_its_own_precision(self, folder):
        """float32 was measured first and stays; bfloat16 beside it has its own baseline, and both are named."""
        half = {"dtype": "bfloat16", "run_id": "half"}
        rows = [make(), make("ivc_prune", score=70.0), make(**half, score=60.0)]
        path = write(folder, *rows, make("ivc_prune", **{**half, "run_id": "half-ivc"}, score=59.0))
        comparison = compare(path)
        assert {(row.settings, row.score_baseline, row.difference) for row in comparison.rows} == {
            ("dtype=float32", 80, -10),
            ("dtype=bfloat16", 60, -1),
        }
        assert not any("dtype" in note for row in comparison.rows for note in row.notes)
        for dtype, count in (("bfloat16", 1), ("float32", 1), (None, 2)):
            assert len(compare(path, select=Selection(dtype=dtype).fits).rows) == count
        with pytest.raises(ValueError, match="no row is the one asked for"):
            compare(path, select=Selection(dtype="float16").fits)

    @pytest.mark.parametrize(("column", "values"), WAYS.items())
    def test_each_way_of_computing_has_its_name_its_key_and_its_baseline(self, folder, column, values):
        rows = []
        for number, value in enumerate(values):
            own = {column: value, "run_id": f"none {value}"}
            pruned = {column: value, "run_id": f"ivc {value}"}
            rows += [make(**own, score=80.0 - 20 * number), make("ivc_prune", **pruned, score=70.0 - 20 * number)]
        path = write(folder, *rows)
        found = compare(path).rows
        assert [row.settings for row in found] == [f"{column}={value}" for value in values]
        assert [row.score_baseline for row in found] == [80, 60]
        keys = [variant_key(row) for row in found]
        assert len({*keys}) == 2
        assert keys == [variant_key(row) for row in read_results(path) if row["method"] == "ivc_prune"]
        for value in values:
            (row,) = compare(path, select=lambda row, value=value: row[column] == value).rows
            assert getattr(row, column) == value

    def test_two_equal_baselines_are_ambiguous(self, folder):
        copies = [make(checkpoint=name, run_id=name, score=score) for name, score in (("a", 80.0), ("b", 79.0))]
        write(folder, *copies, make("ivc_prune", score=70.0))
        with pytest.raises(ValueError, match=r"2 baseline rows fit .* differ in checkpoint, score, run_id"):
            compare(folder / "results.csv")

    def test_unfinished_rows_are_named_not_compared(self, folder):
        failed = make("fastv", status="failed", score=None, reason="out of memory")
        lonely = make("ivc_prune", benchmark="lonely")
        rows = [
            make(predictions="runs/none.csv"),
            make("ivc_prune", score=70.0, predictions="runs/ivc.csv"),
            failed,
            lonely,
        ]
        comparison = compare(write(folder, *rows))
        assert len(comparison.rows) == 1
        text = comparison.to_terminal(999)
        assert "Not compared: qwen25 dev accuracy fastv 0.5: failed (out of memory)" in text
        assert "Not compared: qwen25 lonely accuracy ivc_prune 0.5: no baseline row" in text

    def test_nothing_to_compare(self, folder):
        with pytest.raises(ValueError, match=r"nothing to compare .*\n  .*no pruned row"):
            compare(write(folder, make()))
        with pytest.raises(ValueError, match="the baseline file knows the models deepseek_vl2_small, internvl25"):
            compare(write(folder, make("ivc_prune", model="tiny")), BASELINES / "ivc_prune_paper.csv")
        known = (
            "the baseline file knows the benchmarks MMBench_DEV_EN_V11, RefCOCO[+]_testA, RefCOCO_testA, SEEDBench_IMG"
        )
        with pytest.raises(ValueError, match=known):
            compare(write(folder, make("ivc_prune", benchmark="POPE")), BASELINES / "ivc_prune_paper.csv")
        unfinished = make(status="incomplete", reason="killed", score=None)
        with pytest.raises(ValueError, match=r"its baseline is incomplete \(killed\)"):
            compare(write(folder, unfinished, make("ivc_prune")))
        with pytest.raises(FileNotFoundError):
            compare(folder / "absent.csv")


class TestSelection:
    @pytest.fixture
    def several(self, folder) -> Path:
        rows = [make(predictions="runs/none.csv"), make(limit=4, run_id="few")]
        rows += [
            make(
                "ivc_prune",
                run_id=f"{layer}-{ratio}",
                ratio_asked=ratio,
                method_parameters={"layer": layer},
                set_parameters="layer" if layer != 2 else "",
                score=70.0,
            )
            for layer in (2, 3)
            for ratio in (0.5, 0.25)
        ]
        rows += [make("fastv", run_id="held", ratio_asked=0.5, budget="flops(1024+64)", score=75.0)]
        rows += [make("fastv", run_id="small", limit=4, score=50.0)]
        rows += [make(benchmark="MME", run_id="MME"), make("pool", benchmark="MME", run_id="M", ratio_asked=0.25)]
        return write(folder, *rows)

    def test_a_variant_states_what_was_set_whatever_stands_beside_it(self, several):
        alone = compare(several, select=Selection(parameters={}).fits)
        names = {row.variant for row in compare(several).rows}
        assert {row.variant for row in alone.rows} <= names
        assert {"ivc_prune 0.5", "ivc_prune(layer=3) 0.5"} <= names

    def test_files_that_do_not_say_what_was_set_tell_variants_apart(self, folder):
        rows = [make("ivc_prune", run_id=f"{n}", method_parameters={"layer": n, "ivc": 0.1}) for n in (2, 3)]
        assert [row.variant for row in compare(write(folder, make(), *rows)).rows] == [
            "ivc_prune(layer=2) 0.5",
            "ivc_prune(layer=3) 0.5",
        ]

    @pytest.mark.parametrize(
        ("chosen", "variants"),
        [
            ({"method": "fastv"}, ["fastv 0.5 of flops(1024+64)", "fastv 0.5"]),
            ({"method": "fastv", "budget": "flops"}, ["fastv 0.5 of flops(1024+64)"]),
            ({"budget": "own", "ratio": 0.5, "parameters": {"layer": 3}}, ["ivc_prune(layer=3) 0.5"]),
            ({"parameters": {"layer": 2}}, ["ivc_prune 0.5", "ivc_prune 0.25"]),
            ({"method": "ivc_prune", "parameters": {}}, ["ivc_prune 0.5", "ivc_prune 0.25"]),
            ({"limit": 4}, ["fastv 0.5"]),
            ({"method": "fastv", "limit": 0}, ["fastv 0.5 of flops(1024+64)"]),
            ({"benchmarks": ["MME"]}, ["pool 0.25"]),
        ],
    )
    def test_rows_of_a_request(self, several, chosen, variants):
        rows = compare(several, select=Selection(**chosen).fits).rows
        assert [row.variant for row in rows] == variants

    def test_a_limited_row_is_compared_with_the_limited_baseline(self, several):
        comparison = compare(several)
        small = next(row for row in comparison.rows if row.limit == 4)
        assert "only the first 4 rows of the benchmark were asked" in small.notes
        assert "limit" in comparison.to_terminal(999)

    def test_a_limited_row_is_not_compared_with_the_whole_baseline(self, folder):
        with pytest.raises(ValueError, match="limit: baseline empty, results 4"):
            compare(write(folder, make(), make("fastv", limit=4)))

    def test_what_there_is_instead(self, several):
        with pytest.raises(ValueError, match=r"(?s)nothing to compare.*there are:.*ivc_prune 0\.5 layer=3.*fastv 0\.5"):
            compare(several, select=Selection(method="iwp").fits)

    def test_different_generation_settings_are_refused_where_both_are_noted(self, folder):
        greedy, sampled = {"do_sample": False}, {"do_sample": True}
        with pytest.raises(ValueError, match="generation: baseline"):
            compare(write(folder, make(generation=greedy), make("fastv", generation=sampled)))
        assert compare(write(folder, make(), make("fastv", generation=sampled))).rows

    def test_the_verb(self, several, capsys):
        options = ["--method", "ivc_prune", "--ratio", "0.25", "--set", "layer=3"]
        assert cli.main(["compare", str(several), *options]) == 0
        assert "ivc_prune(layer=3) 0.25" in capsys.readouterr().out

    def test_the_verb_takes_what_eval_took(self, several, tmp_path, capsys):
        assert cli.main(["compare", str(several), "--method", "ivc_prune", "--set", "--limit", "0"]) == 0
        assert "layer=" not in capsys.readouterr().out
        assert cli.main(["compare", str(several), "--data", "embedded", "MME"]) == 0
        out = capsys.readouterr().out
        assert "pool 0.25" in out
        assert "fastv" not in out
        mine = tmp_path / "mine.py"
        mine.write_text("")
        assert cli.main(["compare", str(several), "--method", f"{mine}"]) == 2
        assert "no row is the one asked for" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("given", "asked"),
        [
            ([], "--method ivc_prune --ratio 0.5 --budget own --set --limit 0"),
            (
                ["SEED=1", "DTYPE=bfloat16", "ATTENTION=eager", "DEVICE=cpu"],
                "--method ivc_prune --ratio 0.5 --budget own --set --limit 0 --seed 1 --dtype bfloat16 "
                "--attention eager --device cpu",
            ),
            (
                ["METHOD=fastv", "SET=layer=2", "BUDGET=flops", "RATIO=0.6", "LIMIT=4", "DATA=POPE MME"],
                "--method fastv --ratio 0.6 --budget flops --set layer=2 --limit 4 --data POPE MME",
            ),
        ],
    )
    def test_make_compare_asks_for_what_make_eval_made(self, given, asked):
        said = subprocess.run(
            ["make", "-n", "compare", "READY=", "MODEL=qwen25", *given],
            cwd=BASELINES.parents[1],
            env={"PATH": os.environ["PATH"]},  # a make around the tests must not hand down its flags
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said.split("ivcp ")[1].split() == ["compare", "results/eval/qwen25.csv", *asked.split()]


class TestTable:
    @pytest.mark.parametrize("width", [80, 100, 120, 200])
    def test_no_line_is_longer_than_the_terminal(self, folder, width):
        name = {"model": "deepseek_vl2_small", "benchmark": "MMBench_DEV_EN_V11"}
        rows = [make(**name, predictions="runs/none.csv"), make(predictions="runs/none.csv")]
        for method in ("ivc_prune", "fastv+ivc"):
            more = {"score": 70.0, "predictions": "runs/ivc.csv", "budget": "flops(1024+64)", "preset": "general"}
            rows += [make(method, **name, **more, run_id=method), make(method, **more, run_id=f"{method} 2")]
        results = write(folder, *rows)
        monkey = {"results": "results.csv", "baseline": "results.csv"}
        text = dataclasses.replace(compare(results), **monkey).to_terminal(width)
        assert max(map(len, text.splitlines())) <= width
        for cell in ("fastv+ivc", "flops(1024+64)", "MMBench", "-10.0 [-", "87.5", "10 / 4", "0.75", "60"):
            assert cell in text

    def test_outside_a_terminal_lines_have_at_most_120(self, folder, monkeypatch):
        monkeypatch.delenv("COLUMNS", raising=False)
        text = dataclasses.replace(compare(folder / "results.csv"), results="r", baseline="r").to_terminal()
        assert 80 < max(map(len, text.splitlines())) <= 120

    def test_what_is_the_same_in_all_rows_is_said_once(self, folder):
        rows = [make("ivc_prune", score=70.0, run_id="a"), make("fastv", score=60.0, run_id="b")]
        text = compare(write(folder, make(), *rows)).to_terminal(999)
        assert "model qwen25, benchmark dev, metric accuracy" in text
        assert "qwen25" not in next(line for line in text.splitlines() if line.startswith("fastv 0.5"))

    def test_terminal(self, folder):
        text = compare(folder / "results.csv").to_terminal(999)
        line = next(line for line in text.splitlines() if "ivc_prune 0.5" in line)
        for cell in ("qwen25", "dev", "80.0", "70.0", "-10.0 [-", " 60 ", "87.5", "10 / 4", "0.50   0.75    0.50"):
            assert cell in line
        assert "its unpruned rows" in text
        assert "Paired: 1 of 1 rows" in text
        assert "Holm" in text
        assert "80 % power" in text
        assert LOUD not in text

    def test_markdown(self, folder):
        text = compare(folder / "results.csv").to_markdown()
        assert "| qwen25  | dev" in text
        assert "\n- Paired: 1 of 1" in text

    def test_a_significant_loss_is_marked(self, folder, scores):
        write_samples(folder / "runs" / "ivc.csv", samples([0.0] * 30 + [1.0] * 18 + [0.0] * 12))
        write(folder, make(predictions="runs/none.csv"), make("ivc_prune", score=30.0, predictions="runs/ivc.csv"))
        assert "30.0*" in compare(folder / "results.csv").to_terminal()

    @pytest.mark.parametrize("untrained", ["none", "ivc_prune"])
    def test_random_weights_are_loud(self, folder, untrained):
        rows = [make(trained_weights=untrained != "none"), make("ivc_prune", trained_weights=untrained != "ivc_prune")]
        text = compare(write(folder, *rows), force=True).to_terminal()
        assert " ".join(text.split()).count(LOUD) == 2, "in however many lines"

    def test_csv(self, folder, tmp_path):
        import pandas as pd

        comparison = compare(folder / "results.csv", margin=1)
        comparison.write_csv(tmp_path / "comparison.csv")
        frame = pd.read_csv(tmp_path / "comparison.csv")
        assert len(frame) == 1
        assert frame.loc[0, "difference"] == -10
        assert frame.loc[0, "timed_samples"] == 0
        assert bool(frame.loc[0, "paired"])
        assert list(frame) == list(comparison.to_frame())

    def test_mean_retained_counts_each_benchmark_once(self, folder):
        rows = []
        for benchmark, retained in (("a", 0.9), ("b", 0.7)):
            rows += [make(benchmark=benchmark), make(benchmark=benchmark, metric="other")]
            rows += [make("ivc_prune", benchmark=benchmark, score=80 * retained)]
            rows += [make("ivc_prune", benchmark=benchmark, metric="other", score=0.0)]
        text = compare(write(folder, *rows)).to_terminal()
        assert "Mean retained, qwen25 ivc_prune 0.5: 80.0 % over 2 benchmarks." in text

    @pytest.mark.parametrize("average", AVERAGES, ids=lambda average: average.name)
    def test_averages_are_computed_as_the_paper_does(self, tmp_path, average):
        """The mean of the shares retained, not the share of the mean; over all of its benchmarks or not at all."""
        rows, shares = [], []
        for number, name in enumerate(average.benchmarks):
            own = {"benchmark": name, "metric": headline({"benchmark": name, "metric": ""}), "max_pixels": None}
            before, after = 50.0 + 5 * number, 45.0 + 4 * number
            rows += [make(**own, score=before, run_id=f"none {name}")]
            rows += [make("ivc_prune", **own, score=after, run_id=f"ivc {name}")]
            shares.append(100 * after / before)
        text = compare(write(tmp_path, *rows)).to_terminal(999)
        said = f"As the IVC-Prune paper averages, {average.words}: qwen25 ivc_prune 0.5 retains {np.mean(shares):.1f} %"
        published = {"average_8_grounding": 99.6, "average_9_vqa": 100.6}[average.name]
        assert f"{said} (the paper prints {published} %, with 50 % of the tokens kept)." in text
        assert {"average_8_grounding": 8, "average_9_vqa": 9}[average.name] == len(shares)
        assert "As the IVC-Prune paper averages" not in compare(write(tmp_path, *rows[:-2])).to_terminal(999)
        assert all(data_file(name).is_file() for name in average.benchmarks)


class TestReference:
    def test_a_variant_that_is_not_there_is_answered_with_those_that_are(self, folder):
        rows = [make("fastv", benchmark=name, ratio_asked=ratio) for name in "abcd" for ratio in (0.5, 0.25)]
        path = write(folder, *(make(benchmark=name) for name in "abcd"), *rows)
        with pytest.raises(ValueError, match="nothing to compare") as caught:
            compare(path, against="fastv:0.3")
        said = str(caught.value)
        assert "the baseline file has fastv:0.5, fastv:0.25" in said
        assert len(said.splitlines()) == 2, "one line, not one a row"
        text = compare(path, against="fastv:0.5").to_terminal(999)
        assert "* differs from fastv 0.5 at 5 %" in text


class TestVerdict:
    @pytest.mark.parametrize(("margin", "verdict"), [(50, "not worse"), (0.01, "worse"), (20, "undecided")])
    def test_margin(self, folder, scores, margin, verdict):
        pruned = scores[0].copy()
        pruned[:12] = 0
        write_samples(folder / "runs" / "ivc.csv", samples(pruned))
        write(folder, make(predictions="runs/none.csv"), make("ivc_prune", score=60.0, predictions="runs/ivc.csv"))
        comparison = compare(folder / "results.csv", margin=margin)
        assert comparison.rows[0].verdict == verdict
        assert verdict in comparison.to_terminal()

    @pytest.mark.parametrize(("margin", "verdict"), [(5, "undecided"), (15, "not worse")])
    @pytest.mark.parametrize("gained", [0, 1])
    def test_hardly_a_difference_in_few_samples_proves_little(self, folder, scores, margin, verdict, gained):
        """Thirty clusters without a loss exclude one of 15 %, not one of 5 %; one gained answer changes nothing."""
        pruned = scores[0].copy()
        pruned[np.flatnonzero(pruned == 0)[:gained]] = 1
        write_samples(folder / "runs" / "ivc.csv", samples(pruned))
        score = 80.0 + 100 * gained / N
        write(folder, make(predictions="runs/none.csv"), make("ivc_prune", score=score, predictions="runs/ivc.csv"))
        (row,) = compare(folder / "results.csv", margin=margin).rows
        assert row.difference_low == 0
        assert row.verdict == verdict
