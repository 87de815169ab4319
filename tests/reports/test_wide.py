"""Wide tables: headline metrics, retained shares, and averages only where nothing is missing."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

from ivcp_eval.interface import models
from ivcp_eval.interface.registry import make_method
from ivcp_eval.reports.table import make_row, write_results, write_samples
from ivcp_eval.reports.wide import Table, _latex, _name, tables, write_tables


def row(
    benchmark: str, method: str, score: float | None, metric: str = "accuracy", **more: object
) -> dict[str, object]:
    status = {"status": "ok"} if score is not None else {"status": "incomplete", "reason": "2 of 9 samples failed"}
    values = {
        "model": "qwen25", "benchmark": benchmark, "metric": metric, "method": method, "score": score, "run_id": "r",
        "ratio_kept_final": 0.5 if method == "ivc_prune" else None,
        "ratio_layer_mean": 0.75 if method == "ivc_prune" else None,
        "ratio_asked": 1.0 if method == "none" else 0.5, "score_scale": 100, "seed": 0, "trained_weights": True,
        **status, **more,
    }  # fmt: skip
    return make_row(**values)


ROWS = [
    row("tiny_mcq", "none", 80.0),
    row("tiny_mcq", "none", 55.0, metric="colour"),
    row("tiny_mcq", "ivc_prune", 60.0, method_parameters={"layer": 5, "ivc": 0.1}),
    row("tiny_mcq", "fastv", 40.0),
    row("tiny_yes_no", "none", 50.0),
    row("tiny_yes_no", "ivc_prune", 50.0, method_parameters={"layer": 5, "ivc": 0.1}),
    row("tiny_yes_no", "fastv", None),
    row("tiny_mcq", "none", 10.0, model="llava15", trained_weights=False),
]


def scores(table: Table) -> list[list[str]]:
    """Lines of the first Markdown table, without the rule."""
    lines = [line for line in table.to_markdown().split("Retained,")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "--" not in line]


def test_wide_table() -> None:
    first, second = tables(ROWS)
    assert scores(first) == [
        ["method", "ratio", "kept", "layers", "tiny_mcq", "tiny_yes_no", "retained %"],
        ["unpruned", "1", "-", "-", "80.0", "50.0", "100.0"],
        ["ivc_prune (layer=5)", "0.5", "0.50", "0.75", "60.0", "50.0", "87.5"],
        ["fastv", "0.5", "-", "-", "40.0", "-", "-"],
    ]
    assert [line.cells["tiny_mcq"].retained for line in first.lines] == [100, 75, 50]
    assert not first.note
    assert "mean nothing" in second.note


def test_a_planned_benchmark_without_any_row_is_a_gap_and_not_averaged_over() -> None:
    rows = [row("tiny_mcq", "none", 80.0), row("tiny_mcq", "fastv", 40.0)]
    (table,) = tables(rows, {"qwen25": ["tiny_yes_no", "tiny_mcq"]})
    assert [cells[4:] for cells in scores(table)] == [
        ["tiny_yes_no", "tiny_mcq", "retained %"],
        ["-", "80.0", "-"],
        ["-", "40.0", "-"],
    ]


def test_budgets_and_limits_are_variants_of_their_own() -> None:
    held = row("tiny_mcq", "fastv", 44.0, budget="flops(1024+64)", ratio_method=0.3)
    few = [row("tiny_mcq", "none", 50.0, limit=4), row("tiny_mcq", "fastv", 25.0, limit=4)]
    (table,) = tables([*ROWS[:1], row("tiny_mcq", "fastv", 40.0), held, *few])
    assert [(*cells[:2], cells[4], cells[5]) for cells in scores(table)[2:]] == [
        ("fastv", "0.5", "40.0", "50.0"),
        ("fastv", "0.5 flops(1024+64)", "44.0", "55.0"),
        ("unpruned", "1 (first 4)", "50.0", "100.0"),
        ("fastv", "0.5 (first 4)", "25.0", "50.0"),
    ]


def test_seeds_are_one_line_with_their_spread() -> None:
    drawn = [row("tiny_mcq", "random", score, seed=seed) for seed, score in enumerate((40.0, 44.0, 48.0))]
    (table,) = tables([*ROWS[:1], *drawn])
    assert scores(table)[2] == ["random", "0.5", "-", "-", "44.0 ± 4.0", "55.0"]
    assert table.lines[1].seeds == 3


def test_formats(tmp_path: Path) -> None:
    """Significant losses are marked; every cell of the CSV is a number, true, false or empty."""
    right = {"none": [1.0] * 60, "fastv": [0.0] * 60, "random": [1.0] * 59 + [0.0]}
    rows = []
    for method, values in right.items():
        samples = [{"index": i, "score": score} for i, score in enumerate(values)]
        write_samples(tmp_path / f"{method}.csv", samples)
        rows.append(row("tiny_mcq", method, 100 * sum(values) / 60, predictions=f"{method}.csv", run_id=method))
    write_results(tmp_path / "sweep.csv", rows)
    assert [table.model for table in write_tables(tmp_path / "sweep.csv")] == ["qwen25"]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {f"qwen25.{end}" for end in ("csv", "md", "tex")}
    lines = (tmp_path / "sweep/qwen25.md").read_text().splitlines()
    assert lines[2:7] == [
        "| method   | ratio | kept | layers | tiny_mcq | retained % |",
        "| -------- | ----: | ---: | -----: | -------: | ---------: |",
        "| unpruned |     1 |    - |      - |    100.0 |      100.0 |",
        "| fastv    |   0.5 |    - |      - |     0.0* |        0.0 |",
        "| random   |   0.5 |    - |      - |     98.3 |       98.3 |",
    ]
    with (tmp_path / "sweep/qwen25.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [line["tiny_mcq significant"] for line in table] == ["", "true", "false"]
    for line in table:
        assert all(re.fullmatch(r"[-+.e0-9]*|true|false", cell) for name, cell in line.items() if name != "method")
    assert r"random & 0.5 & - & - & 98.3 & 98.3 \\" in (tmp_path / "sweep/qwen25.tex").read_text()


def test_without_a_comparison_there_are_no_marks_and_the_reason_stands_below(tmp_path: Path) -> None:
    write_results(tmp_path / "sweep.csv", [row("tiny_mcq", "none", 80.0)])
    write_tables(tmp_path / "sweep.csv")
    assert "Without marks of significance: nothing to compare" in (tmp_path / "sweep/qwen25.md").read_text()


def test_a_wrapped_method_shows_only_what_is_not_its_default() -> None:
    given = dataclasses.asdict(make_method("fastv+ivc", {"ivc": 0.2}))  # type: ignore[call-overload]
    assert _name("qwen25", "fastv+ivc", json.dumps(given)) == "fastv+ivc (ivc=0.2)"


def test_defaults_of_the_checkpoint_are_not_shown() -> None:
    own = models.find("tiny")[1].methods["ivc_prune"]
    given = dataclasses.asdict(make_method("ivc_prune", own))  # type: ignore[call-overload]
    assert _name("tiny", "ivc_prune", json.dumps(given)) == "ivc_prune"
    assert _name("tiny", "ivc_prune", json.dumps({**given, "layer": 4})) == "ivc_prune (layer=4)"


def test_latex_takes_any_text_literally() -> None:
    """Every character that TeX gives a meaning stands for itself, so that a table compiles whatever it is called."""
    header = ("a_b", "50% & more", "#1", "x^2~y", "$d {e: 1}", "C:\\ <1|2>")
    lines = _latex([header, header])
    assert lines[0] == r"\begin{tabular}{lrrrrr}"
    assert (
        lines[2]
        == lines[4]
        == (
            r"a\_b & 50\% \& more & \#1 & x\textasciicircum{}2\textasciitilde{}y & \$d \{e: 1\} & "
            r"C:\textbackslash{} \textless{}1\textbar{}2\textgreater{} \\"
        )
    )
    bare = re.sub(r"\\[a-z]+\{\}|\\[%_&#${}]", "", lines[2].removesuffix(r" \\"))
    assert not set(bare) & set("%_#^~${}\\<>|")
    assert bare.count("&") == len(header) - 1


def test_the_note_says_how_many_samples_each_benchmark_has() -> None:
    rows = [{**one, "n_samples": 300 if one["benchmark"] == "tiny_mcq" else 40} for one in ROWS]
    (table, _) = tables(rows)
    assert table.note == "Samples: tiny_mcq 300, tiny_yes_no 40; `ivcp compare` has intervals."


def test_rows_of_other_precisions_are_lines_of_their_own() -> None:
    both = [{**one, "dtype": dtype} for dtype in ("float32", "bfloat16") for one in ROWS if one["model"] == "qwen25"]
    both[-3]["score"] = 25.0  # unpruned yes-no questions in bfloat16
    (table,) = tables(both)
    lines = {(line.method, name): cell for line in table.lines for name, cell in line.cells.items()}
    assert {name for name, _ in lines} >= {"unpruned (float32)", "unpruned (bfloat16)", "fastv (bfloat16)"}
    halves = [cell.retained for (name, where), cell in lines.items() if "ivc" in name and where == "tiny_yes_no"]
    assert halves == [100.0, 200.0], "each beside its own baseline"
