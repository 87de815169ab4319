"""The report's numbers are those of the comparison, the decision and the per-sample files."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcp_eval.files import file_digest
from ivcp_eval.interface.records.masks import CutMask, ImageCells, Masks, View
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.html import collect as collecting
from ivcp_eval.reports.html import samples as pictured
from ivcp_eval.reports.html.collect import MOST_PICTURES, collect
from ivcp_eval.reports.html.model import Report
from ivcp_eval.reports.html.questions import MOST_JPEG, Questions, jpeg
from ivcp_eval.reports.provenance import variant_key
from ivcp_eval.reports.table import make_row, read_samples, write_results, write_samples
from ivcp_eval.reports.views import decision
from ivcp_eval.reports.views.costs import join
from ivcp_eval.reports.views.curves import BETTER, curve_rows
from ivcp_eval.reports.views.decision import Policy, decide
from tests.reports.html.conftest import COLUMNS, ROWS, VISUAL, questions
from tests.reports.test_compare import WAYS


def test_rows_and_verdicts_are_those_of_compare_and_decide(results: Path, report: Report) -> None:
    assert repr(report.comparison.rows) == repr(compare(results, resamples=500).rows)
    assert report.decision is not None
    assert report.decision.to_json() == decide(results, Policy(5), resamples=500).to_json()
    assert report.comparison.left_out == ("tiny tiny_short accuracy fastv 0.1: skipped (no such layer)",)
    assert collect(results, resamples=20).decision is None, "no rule, no verdict"


def test_flips_are_those_of_the_comparison(report: Report) -> None:
    counted = {(one.benchmark, one.variant): one for one in report.flip_counts}
    rows = [row for row in report.comparison.rows if row.method in ("fastv", "visionzip")]
    assert (len(rows), len(counted)) == (4, 8)
    for row in rows:
        one = counted[row.benchmark, row.variant]
        assert (one.lost, one.gained) == (row.right_to_wrong, row.wrong_to_right)
        assert report.cards_of(one) == one.lost + one.gained + one.changed, "there is room for all"
    assert counted["tiny_short", "fastv 0.5"].gained == 1
    assert counted["tiny_short", "fastv 0.5"].changed == 1, "nobody knows the last one, and nobody says the same"


@pytest.mark.parametrize(("column", "values"), WAYS.items())
def test_samples_are_held_against_the_baseline_of_the_same_way(
    tmp_path: Path, column: str, values: tuple[str, str]
) -> None:
    """The second way's unpruned model is wrong where its variant is: nothing flips."""
    rows = []
    for value in values:
        for method, wrong in (("none", value == values[1]), ("fastv", True)):
            name = f"{method} {value}.csv"
            write_samples(tmp_path / name, [{"index": i, "score": float(not (wrong and i < 3))} for i in range(20)])
            rows.append(
                make_row(
                    **{"model": "tiny", "benchmark": "dev", "metric": "accuracy", "method": method, "status": "ok"},
                    **{"score": 85.0 if wrong else 100.0, "score_scale": 100, "run_id": name, "predictions": name},
                    **{"ratio_asked": 1.0 if method == "none" else 0.5, "trained_weights": True, column: value},
                )
            )
    write_results(tmp_path / "r.csv", rows)
    counts = {one.variant: one.lost for one in collect(tmp_path / "r.csv", resamples=20).flip_counts}
    assert counts == {f"fastv({column}={values[0]}) 0.5": 3, f"fastv({column}={values[1]}) 0.5": 0}


def test_costs_are_joined_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and joining bench files is the decision's, where there is one; both say the same."""
    joined: list[int] = []

    def counted(*args: Any) -> Any:
        joined.append(len(joined))
        return join(*args)

    for module in (collecting, decision):
        monkeypatch.setattr(module, "join", counted)
    found = [collect(results, policy, resamples=20).benched for policy in (Policy(5), None)]
    assert joined == [0, 1]
    assert found[0] == found[1]
    assert found[0]
    assert len(found[0].lines) == 2


def test_answers_are_compared_letter_by_letter(report: Report) -> None:
    asked = {row["index"]: row for row in questions("tiny_short")}
    flip = next(one for one in report.flips if one.benchmark == "tiny_short" and one.kind == "lost")
    assert flip.question == asked[flip.index]["question"]
    assert flip.gold == asked[flip.index]["answer"] == "".join(text for text, _ in flip.before)
    assert "".join(text for text, _ in flip.after) == f"not {flip.gold} by {flip.variant.split()[0]}?"
    shared = ["".join(text for text, same in side if same) for side in (flip.before, flip.after)]
    assert shared[0] == shared[1] == flip.gold


def test_pictures_show_what_the_samples_hold(results: Path, report: Report) -> None:
    assert report.pictures
    for picture in report.pictures:
        assert 0 < len(picture.jpeg) <= MOST_JPEG
        assert not picture.missing
        seeds = {f"random {ratio} (seed 1, one of 2)" for ratio in (0.5, 0.25)}
        assert {one.variant for one in picture.shown} == {"unpruned", "fastv 0.5", "visionzip 0.25", *seeds}
        for one in picture.shown[1:]:
            method, ratio, *_ = one.variant.split()
            seed = 1 if method == "random" else 0
            file = results.parent / f"{picture.benchmark}-{method}-{ratio}-{seed}" / "predictions.csv"
            sample = next(row for row in read_samples(file) if row["index"] == picture.index)
            assert one.tokens == sample["visual_tokens"] == VISUAL
            assert one.cuts[-1].kept == sample["visual_kept"]
            mask = Masks.from_text(sample["masks"]).mask()
            assert one.grid == mask.shape == (ROWS, COLUMNS)
            assert list(one.cuts[-1].dropped) == (~mask).ravel().nonzero()[0].tolist()
            merged = one.cuts[-1].dropped[-(VISUAL - 1 - one.cuts[-1].kept) :] if method == "visionzip" else ()
            assert one.cuts[-1].merged == merged
            assert one.iou == pytest.approx(math.nan if sample["iou"] is None else sample["iou"], nan_ok=True)
            assert (one.box is None) == (picture.benchmark != "tiny_grounding") == (picture.box is None)


def test_marks_are_hollow_where_curves_say_so(results: Path, report: Report) -> None:
    said = {(row["benchmark"], row["method"], row["ratio_asked"]): row["verdict"] for row in curve_rows(results, 500)}
    marks = [(panel, mark) for panel in report.panels for mark in panel.marks]
    assert len(marks) == 2 * 4
    for panel, mark in marks:
        method, ratio = mark.variant.split()
        verdict = said[panel.benchmark, method, float(ratio)]
        assert mark.better == (None if mark.random else verdict == BETTER)
    assert {mark.better for _, mark in marks} == {True, None}
    assert all(mark.better is None for one in report.paretos for mark in one.marks if mark.random)


def test_means_over_benchmarks_and_the_noise_floor(report: Report) -> None:
    (pareto,) = report.paretos
    assert pareto.benchmarks == ("tiny_grounding", "tiny_short")
    mark = next(mark for mark in pareto.marks if mark.method == "fastv")
    rows = [row for row in report.comparison.rows if row.method == "fastv"]
    assert mark.score == pytest.approx(np.mean([row.retained_percent for row in rows]))
    below = [row.retained_percent - row.retained_percent_low for row in rows]
    assert mark.score - mark.low == pytest.approx(math.hypot(*below) / 2)
    assert mark.costs["prefill"] == pytest.approx(0.7)
    floors = {row.benchmark: abs(row.difference) for row in report.again}
    assert {panel.benchmark: panel.floor for panel in report.panels} == floors
    assert pareto.floor == pytest.approx(max(abs(row.retained_percent - 100) for row in report.again))
    assert pareto.floor > 0


def test_tokens_saved_are_not_time_saved(report: Report) -> None:
    costs = {one.variant: one for one in report.costs}
    slow, fast = costs["visionzip 0.25"], costs["fastv 0.5"]
    assert slow.words == "75 % of the tokens saved but no time saved: the prefill is slower"
    assert fast.words == "50 % of the tokens saved, 30 % of the time of the prefill saved"
    prefill, whole = fast.stages["prefill"], fast.stages["end_to_end"]
    assert (prefill.before.median, prefill.after.median, prefill.bound) == pytest.approx((10, 7, 0.5))
    assert whole.bound == pytest.approx((60 - 5) / 60), "only the prefill shrinks"
    assert fast.kv_bytes_unpruned == VISUAL * 10 * 2 * 64 * 2
    assert fast.kv_bytes == fast.kv_bytes_unpruned / 2


def test_times_of_other_sessions_are_not_paired(results: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(results.parent, copy)
    for benchmark in ("tiny_grounding", "tiny_short"):
        path = copy / f"{benchmark}-fastv-0.5-0" / "timing.json"
        path.write_text(path.read_text().replace('"session": "s"', '"session": "another day"'))
    costs = {one.variant: one for one in collect(copy / results.name, resamples=20).costs}
    assert not costs["fastv 0.5"].stages
    assert costs["visionzip 0.25"].stages


def test_abilities_are_means_by_category(results: Path, report: Report) -> None:
    rows = [one for one in report.abilities if (one.benchmark, one.variant) == ("tiny_short", "visionzip 0.25")]
    sides = [
        read_samples(results.parent / place / "predictions.csv")
        for place in ("tiny_short-none-1.0-0", "tiny_short-visionzip-0.25-0")
    ]
    assert {one.category for one in rows} == {sample["category"] for sample in sides[0]}
    for one in rows:
        means = [100 * np.mean([s["score"] for s in side if s["category"] == one.category]) for side in sides]
        assert (one.baseline, one.pruned) == pytest.approx(means)
        assert one.low <= one.retained <= one.high


def test_positions_are_shares_of_cells(report: Report) -> None:
    """The masks keep the first tokens: the upper rows."""
    shares = {(one.variant, one.axis, one.place): one.share for one in report.positions}
    assert shares["visionzip 0.25", "rows", 0.1875] == 1
    assert shares["visionzip 0.25", "rows", 0.9375] == 0
    of_axis = [share for (variant, axis, _), share in shares.items() if (variant, axis) == ("fastv 0.5", "columns")]
    assert np.mean(of_axis) == pytest.approx(10 / 20, abs=0.06)


@pytest.mark.parametrize("cards", [0, 15, 200])
def test_no_more_cards_than_asked_for(results: Path, cards: int) -> None:
    report = collect(results, resamples=20, cards=cards)
    assert report.cards <= cards
    assert len(report.pictures) <= min(MOST_PICTURES, cards // 3)
    assert report.cards >= min(cards, 30)
    kinds = {one.kind for one in report.flips}
    assert kinds == ({"lost", "gained", "changed"} if cards == 200 else {"lost", "gained"} if cards else set())


def test_more_cards_than_a_page_takes_are_refused(results: Path) -> None:
    with pytest.raises(ValueError, match="cards must be from 0 to 200, got 201"):
        collect(results, cards=201)


def test_questions_are_those_of_the_very_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMUData", str(tmp_path))
    assert Questions.read("mine", "0" * 64, {"1"}).missing == "mine.tsv is not on this machine"
    picture = questions("tiny_short")[0]["image"]
    path = tmp_path / "mine.tsv"
    path.write_text(f"index\timage\tquestion\tA\tB\n1\t{picture}\twhich?\tred\tblue\n2\t1\tagain?\t\t\n")
    assert "not the file that was asked" in Questions.read("mine", "0" * 64, {"1"}).missing
    found = Questions.read("mine", file_digest(path), {"2"}).by_index
    assert set(found) == {"2"}
    assert found["2"].text == "again?"
    assert found["2"].picture == picture, "a cell may name the row that has the picture"
    (both,) = Questions.read("mine", file_digest(path), {"1"}).by_index.values()
    assert both.text == "which?\nA. red\nB. blue"


def test_large_pictures_become_small_files() -> None:
    import base64
    import io

    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (1200, 900, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    content, size = jpeg(base64.b64encode(buffer.getvalue()).decode())
    assert len(content) <= MOST_JPEG
    assert size == (900, 1200)
    for bad in ("", "x", "AAAA"):
        with pytest.raises(OSError):
            jpeg(bad)


@pytest.mark.parametrize(("difference", "filled"), [(5.0, True), (-5.0, False)])
def test_a_method_that_is_surely_worse_than_random_is_hollow(report: Report, difference: float, filled: bool) -> None:
    rows = [row for row in report.comparison.rows if row.method == "fastv"]
    beside = {variant_key(row): replace(row, p_holm=0.001, difference=difference) for row in rows}
    panels = collecting._panels(rows, beside)
    assert {mark.better for panel in panels for mark in panel.marks} == {filled}


def test_what_an_early_cut_merged_is_merged_behind_later_cuts_too() -> None:
    """A later cut that only drops has no targets of its own."""
    view = View("picture", np.arange(4).reshape(2, 2), (0.0, 0.0, 1.0, 1.0))
    early = CutMask(2, np.array([True, True, True, False]), np.array([-1, -1, -1, 0]))
    late = CutMask(3, np.array([True, True, False, False]), None)
    masks = Masks((ImageCells(4, (view,)),), (early, late))
    sample = {"masks": masks.to_text(), "box": "", "prediction": "", "score": 1.0, "iou": None}
    cuts = pictured._shown("pool 0.5", sample).cuts
    assert [(cut.dropped, cut.merged) for cut in cuts] == [((3,), (3,)), ((2, 3), (3,))]
