"""The unpruned model's second answers stand beside every number: in all tables, exports and plots."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcp_eval.cli import main
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.comparison import NoiseFloor
from ivcp_eval.reports.html.collect import collect
from ivcp_eval.reports.table import make_row, write_results, write_samples
from ivcp_eval.reports.terminal import floor_text
from ivcp_eval.reports.views import sensitivity
from ivcp_eval.reports.views.curves import curve_rows, write
from ivcp_eval.reports.views.decision import Policy, decide
from ivcp_eval.reports.wide import write_tables

N = 200
#: (method, dtype) -> answers right of 200; the second answers in bfloat16 differ more.
RIGHT = {
    **{("none", "float32"): 160, ("again", "float32"): 159, ("fastv", "float32"): 140, ("random", "float32"): 90},
    **{("none", "bfloat16"): 158, ("again", "bfloat16"): 152, ("fastv", "bfloat16"): 139, ("random", "bfloat16"): 91},
}
FLOAT32, BFLOAT16 = NoiseFloor("", -0.5, 1), NoiseFloor("", -3.0, 6)


def rows_of(folder: Path, *dtypes: str, **more: Any) -> list[dict[str, Any]]:
    rows = []
    for (method, dtype), right in RIGHT.items():
        if dtype not in dtypes:
            continue
        scores = (np.arange(N) < right).astype(float)
        name = f"{method}-{dtype}.csv"
        write_samples(folder / name, [{"index": i, "prediction": str(s), "score": s} for i, s in enumerate(scores)])
        share = 1.0 if method in ("none", "again") else 0.5
        own = {
            "model": "tiny", "benchmark": "tiny_mcq", "metric": "accuracy", "method": method, "dtype": dtype,
            "status": "ok", "score": 100 * right / N, "score_scale": 100, "n_samples": N, "run_id": name,
            "predictions": name, "trained_weights": True, "ratio_asked": share, "ratio_layer_mean": share,
        }  # fmt: skip
        rows.append(make_row(**{**own, **more}))
    return rows


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_results(tmp_path / "r.csv", rows_of(tmp_path, "float32"))
    return tmp_path / "r.csv"


@pytest.fixture
def both(tmp_path: Path) -> Path:
    write_results(tmp_path / "both.csv", rows_of(tmp_path, "float32", "bfloat16"))
    return tmp_path / "both.csv"


@pytest.mark.parametrize("against", ["none", "random", "random:0.5"])
def test_in_every_comparison_of_some_rows_or_all(results: Path, against: str) -> None:
    for select in (lambda row: True, lambda row: row["method"] == "fastv"):
        comparison = compare(results, against=against, resamples=100, select=select)
        for row in comparison.rows:
            assert row.again == (() if row.method == "again" else (FLOAT32,))
        for text in (comparison.to_terminal(60), comparison.to_terminal(999), comparison.to_markdown()):
            assert "A/A" in text
            assert "-0.5 (1)" in text
            assert "A/A: difference of the unpruned model's second answers to its first" in " ".join(text.split())
        stream = io.StringIO()
        comparison.to_csv(stream)
        lines = [row for row in csv.DictReader(stream.getvalue().splitlines()) if row["method"] != "again"]
        assert {(row["again_difference"], row["again_answers_changed"]) for row in lines} == {("-0.5", "1")}


def test_by_the_verb(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--against", "random:0.5"], ["--method", "fastv"]):
        assert main(["compare", str(results), "--resamples", "100", *more]) == 0
        assert "-0.5 (1)" in capsys.readouterr().out


def test_each_precision_has_its_own(both: Path) -> None:
    floors = {(row.method, row.dtype): row.again for row in compare(both, resamples=100).rows}
    assert floors["fastv", "float32"] == (FLOAT32,)
    assert floors["fastv", "bfloat16"] == (BFLOAT16,)


def test_a_published_baseline_is_no_first_answer(tmp_path: Path, results: Path) -> None:
    """What it differs from the second answers says nothing of them; the results' own first answers do."""
    published = make_row(
        model="tiny", benchmark="tiny_mcq", metric="accuracy", method="none", status="ok", score=60.0, score_scale=100,
        source="a paper",
    )  # fmt: skip
    write_results(tmp_path / "paper.csv", [published])
    rows = {row.method: row for row in compare(results, tmp_path / "paper.csv", resamples=100).rows}
    assert rows["fastv"].again == (FLOAT32,)
    report = collect(results, baseline=tmp_path / "paper.csv", resamples=100)
    assert [row.difference for row in report.again] == [-0.5]
    assert [panel.floor for panel in report.panels] == [0.5]


def test_a_baseline_file_brings_its_second_answers_along(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "float32")
    write_results(tmp_path / "base.csv", rows[:2])
    write_results(tmp_path / "pruned.csv", rows[2:])
    compared = compare(tmp_path / "pruned.csv", tmp_path / "base.csv", resamples=100).rows
    assert {row.again for row in compared} == {(FLOAT32,)}
    report = collect(tmp_path / "pruned.csv", baseline=tmp_path / "base.csv", resamples=100)
    assert [row.answers_changed for row in report.again] == [1]
    assert [*{one.floor for one in report.abilities}] == [pytest.approx(100 / 160)]


def test_without_samples_the_difference_is_known_and_the_answers_are_not(results: Path) -> None:
    (results.parent / "again-float32.csv").unlink()
    rows = {row.method: row for row in compare(results, resamples=100).rows}
    assert rows["fastv"].again == (NoiseFloor("", -0.5, None),)
    assert "  -0.5  " in compare(results, resamples=100).to_terminal(999)


def test_in_curves(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    table, _ = write(both, resamples=200)
    lines = [row for row in csv.DictReader(table.open()) if row["method"] == "fastv"]
    assert [(row["dtype"], row["again_difference"], row["again_answers_changed"]) for row in lines] == [
        ("float32", "-0.5", "1"),
        ("bfloat16", "-3", "6"),
    ]
    assert {"attention", "device", "video", "limit", "budget"} <= lines[0].keys(), "what tells variants apart"
    (axis,) = pyplot.gcf().axes
    labels = axis.get_legend_handles_labels()[1]
    assert labels.count("unpruned") == labels.count("A/A noise floor") == 2, "one of each precision"
    assert not any(label.startswith("again") for label in labels)
    spans = sorted((patch.get_y(), patch.get_height()) for patch in axis.patches)
    assert spans == [(pytest.approx(76.0), pytest.approx(6.0)), (pytest.approx(79.5), pytest.approx(1.0))]
    assert "grey: the unpruned model's second answers" in pyplot.gcf().get_suptitle()


def test_curves_of_an_older_version_keep_their_paired_differences(results: Path) -> None:
    """Their columns are fewer; what was paired is still not replaced by what is not."""
    table, _ = write(results, resamples=200)
    rows = list(csv.DictReader(table.open()))
    later = ("dtype", "attention", "device", "video", "again_difference", "again_answers_changed")
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [name for name in rows[0] if name not in later], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for samples in results.parent.glob("*-float32.csv"):
        samples.unlink()
    with pytest.raises(ValueError, match="per-sample files of 3 rows are not here"):
        write(results, resamples=200)


def test_in_wide_tables(both: Path) -> None:
    (table,) = write_tables(both)
    text = (both.parent / "both" / "tiny.md").read_text()
    for line in ("| A/A (float32)  |      |  -0.50 (1) |", "| A/A (bfloat16) |      |  -3.00 (6) |"):
        assert " ".join(line.split()) in [" ".join(there.split()) for there in text.splitlines()]
    assert "A/A: difference of the unpruned model's second answers" in text
    assert "A/A (bfloat16)" in table.to_latex()
    lines = {row["method"]: row for row in csv.DictReader(io.StringIO(table.to_csv()))}
    assert lines["fastv (bfloat16)"]["tiny_mcq A/A"] == "-3"
    assert lines["fastv (bfloat16)"]["tiny_mcq A/A answers changed"] == "6"


def test_two_samplings_of_one_video_are_two_lines_and_other_benchmarks_stay_beside_them(tmp_path: Path) -> None:
    rows = []
    for video in ("8 frames", "16 frames"):
        there = [row for row in rows_of(tmp_path, "float32", video=video) if row["method"] != "again"]
        rows += [{**row, "run_id": video + row["run_id"], "score": 50.0 + len(video)} for row in there]
    write_results(tmp_path / "clips.csv", rows)
    (table,) = write_tables(tmp_path / "clips.csv")
    names = [line.method for line in table.lines]
    assert len(names) == len(set(names)) == 6, "no line stands for two"
    assert {"fastv (8 frames)", "fastv (16 frames)", "unpruned (8 frames)"} <= {*names}
    mixed = [{**row, "device": "cpu" if row["method"] == "none" else "H100"} for row in rows_of(tmp_path, "float32")]
    write_results(tmp_path / "mixed.csv", mixed)
    assert write_tables(tmp_path / "mixed.csv")[0].lines[0].method == "unpruned", "a mixed cluster"


def test_in_verdicts(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decision = decide(results, Policy(0.4), resamples=100)
    assert {(one.again_difference, one.again_answers_changed) for one in decision.verdicts} == {(-0.5, 1)}
    assert "-0.50 (1)" in decision.to_terminal(999)
    (note,) = decision.notes
    assert note == (
        "tiny tiny_mcq: the unpruned model's second answers differ by 0.50 % from its first, no less than the margin."
    )
    assert not decide(results, Policy(0.6), resamples=100).notes
    assert main(["decide", str(results), "--margin", "1", "--csv"]) in (1, 3)
    for line in csv.DictReader(capsys.readouterr().out.splitlines()):
        assert (line["again_difference"], line["again_answers_changed"]) == ("-0.5", "1")


def test_in_every_block_of_a_report(results: Path) -> None:
    pytest.importorskip("altair", reason="the extra `report` is not installed")
    from ivcp_eval.reports.html import charts, render

    report = collect(results, Policy(1), resamples=100)
    assert {one.again for one in report.flip_counts} == {1}
    assert [*{one.floor for one in report.abilities}] == [pytest.approx(100 / 160)]
    layers = charts.abilities(report.abilities).layer
    (stripe,) = [layer for layer in layers if "noise floor" in str(layer.mark.to_dict().get("description"))]
    assert stripe.data.values[0]["high"] == pytest.approx(100 + 100 / 160)
    text = render.page(report)
    for block, cell in (("verdict", "-0.50 (1)"), ("table", "-0.5 (1)"), ("floor", "-0.5 ["), ("abilities", ">0.6<")):
        section = text.partition(f'<section id="{block}"')[2].partition("</section>")[0]
        assert cell in section, block
    assert "A/A: answers changed" in text


def test_a_panel_of_two_precisions_has_both_baselines_and_stripes(both: Path) -> None:
    pytest.importorskip("altair", reason="the extra `report` is not installed")
    from ivcp_eval.reports.html import charts

    report = collect(both, resamples=100)
    (panel,) = report.panels
    assert (panel.baseline, panel.floor, panel.others) == (80.0, 0.5, ((79.0, 3.0),))
    band, rule = charts.panel(panel, report.methods).layer[:2]
    assert band.data.values == [{"low": 79.5, "high": 80.5}, {"low": 76.0, "high": 82.0}]
    assert rule.data.values == [{"score": 80.0}, {"score": 79.0}]


def test_in_a_page_of_sensitivity(results: Path) -> None:
    rows = rows_of(results.parent, "float32")
    changed = {**rows[2], "run_id": "layer 3", "method_parameters": '{"layer":3}', "set_parameters": "layer"}
    write_results(results, [*rows[:2], {**rows[2], "method_parameters": '{"layer":2}'}, changed, rows[3]])
    (table,) = sensitivity.tables(results, resamples=100).values()
    assert [line["tiny_mcq 0.5"] for line in table if line["changed"] == "A/A"] == ["-0.5 (1)"]


def test_nothing_is_said_where_nothing_was_measured(results: Path) -> None:
    write_results(results, [row for row in rows_of(results.parent, "float32") if row["method"] != "again"])
    comparison = compare(results, resamples=100)
    assert all(row.again == () for row in comparison.rows)
    assert "A/A" not in comparison.to_terminal(999)
    assert "A/A" not in write_tables(results)[0].to_markdown()
    assert "A/A" not in decide(results, Policy(1), resamples=100).to_terminal(999)
    assert all(math.isnan(row["again_difference"]) for row in curve_rows(results, resamples=100))


def test_the_baseline_against_itself_is_no_test_that_is_corrected_for(results: Path) -> None:
    assert "Holm's correction over 2 tests" in " ".join(compare(results, resamples=100).to_terminal(999).split())


def test_a_floor_of_other_settings_is_named_wherever_it_stands() -> None:
    assert floor_text(NoiseFloor("dtype=bfloat16", -0.5, 22), 1) == "dtype=bfloat16 -0.5 (22)"
    assert floor_text(NoiseFloor("", -0.5, None), 1) == "-0.5"
