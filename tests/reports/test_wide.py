"""Wide tables: headline metrics, retained shares, and averages only where nothing is missing."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from ivcp_eval.reports.table import make_row
from ivcp_eval.reports.wide import Table, tables, write_tables


def row(
    benchmark: str, method: str, score: float | None, metric: str = "accuracy", **more: object
) -> dict[str, object]:
    status = {"status": "ok"} if score is not None else {"status": "incomplete", "reason": "2 of 9 samples failed"}
    values = {
        "model": "qwen25", "benchmark": benchmark, "metric": metric, "method": method, "score": score, "run_id": "r",
        "ratio_asked": 1.0 if method == "none" else 0.5, "score_scale": 100, "seed": 0, "trained_weights": True,
        **status, **more,
    }  # fmt: skip
    return make_row(**values)


ROWS = [
    row("tiny_mcq", "none", 80.0),
    row("tiny_mcq", "none", 55.0, metric="colour"),
    row("tiny_mcq", "ivc_prune", 60.0, method_parameters={"layer": 3, "ivc": 0.1}),
    row("tiny_mcq", "fastv", 40.0),
    row("tiny_yes_no", "none", 50.0),
    row("tiny_yes_no", "ivc_prune", 50.0, method_parameters={"layer": 3, "ivc": 0.1}),
    row("tiny_yes_no", "fastv", None),
    row("tiny_mcq", "none", 10.0, model="llava15", trained_weights=False),
]


def test_wide_table() -> None:
    first, second = tables(ROWS)
    assert first.header == ("method", "ratio", "tiny_mcq", "tiny_yes_no", "retained")
    assert first.rows == (
        ("unpruned", "1", "80.0", "50.0", "100.0%"),
        ("ivc_prune (layer=3)", "0.5", "60.0 (75.0%)", "50.0 (100.0%)", "87.5%"),
        ("fastv", "0.5", "40.0 (50.0%)", "-", "-"),
    )
    assert not first.note
    assert "mean nothing" in second.note


def test_a_planned_benchmark_without_any_row_is_a_gap_and_not_averaged_over() -> None:
    rows = [row("tiny_mcq", "none", 80.0), row("tiny_mcq", "fastv", 40.0)]
    (table,) = tables(rows, {"qwen25": ["tiny_yes_no", "tiny_mcq"]})
    assert table.header == ("method", "ratio", "tiny_yes_no", "tiny_mcq", "retained")
    assert table.rows == (("unpruned", "1", "-", "80.0", "-"), ("fastv", "0.5", "-", "40.0 (50.0%)", "-"))


def test_budgets_are_variants_of_their_own() -> None:
    held = row("tiny_mcq", "fastv", 44.0, budget="flops(1024+64)", ratio_method=0.3)
    (table,) = tables([*ROWS[:1], row("tiny_mcq", "fastv", 40.0), held])
    assert [cells[:3] for cells in table.rows[1:]] == [
        ("fastv", "0.5", "40.0 (50.0%)"),
        ("fastv", "0.5 flops(1024+64)", "44.0 (55.0%)"),
    ]


def test_formats(tmp_path: Path) -> None:
    written = write_tables(ROWS, tmp_path / "sweep")
    assert [path.name for path in written] == [f"{m}.{s}" for m in ("qwen25", "llava15") for s in ("csv", "md", "tex")]
    assert (tmp_path / "sweep/qwen25.csv").read_text().splitlines()[2] == (
        "ivc_prune (layer=3),0.5,60.0 (75.0%),50.0 (100.0%),87.5%"
    )
    lines = (tmp_path / "sweep/qwen25.md").read_text().splitlines()
    assert lines[2:] == [
        "| method              | ratio |     tiny_mcq |   tiny_yes_no | retained |",
        "| ------------------- | ----: | -----------: | ------------: | -------: |",
        "| unpruned            |     1 |         80.0 |          50.0 |   100.0% |",
        "| ivc_prune (layer=3) |   0.5 | 60.0 (75.0%) | 50.0 (100.0%) |    87.5% |",
        "| fastv               |   0.5 | 40.0 (50.0%) |             - |        - |",
    ]
    latex = (tmp_path / "sweep/qwen25.tex").read_text()
    assert r"ivc\_prune (layer=3) & 0.5 & 60.0 (75.0\%) & 50.0 (100.0\%) & 87.5\% \\" in latex


def test_a_wrapped_method_shows_only_what_is_not_its_default() -> None:
    from ivcp_eval.interface.registry import make_method
    from ivcp_eval.reports.wide import _name

    given = dataclasses.asdict(make_method("fastv+ivc", {"ivc": 0.2}))  # type: ignore[call-overload]
    assert _name(("fastv+ivc", 0.5, json.dumps(given), 0)) == "fastv+ivc (ivc=0.2)"


def test_latex_takes_any_text_literally() -> None:
    """Every character that TeX gives a meaning stands for itself, so that a table compiles whatever it is called."""
    header = ("a_b", "50% & more", "#1", "x^2~y", "$d {e: 1}", "C:\\ <1|2>")
    lines = Table("m", header, (header,)).to_latex().splitlines()
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
