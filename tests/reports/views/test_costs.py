"""A bench line belongs to the very variant that it measured; where none does, what differs is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.cli import main
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.csvfile import ResultsError
from ivcp_eval.reports.table import read_results
from ivcp_eval.reports.views.costs import Costs, join, read_bench
from ivcp_eval.reports.views.decision import Policy, decide
from tests.reports.bench_lines import SIZES, bench_line, write_bench
from tests.reports.views.test_decision import write

LOSSES = {("fastv", "a"): 10, ("ivc_prune", "a"): 6}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("costs"), LOSSES, ratio_layer_mean=0.5, device="cpu")


def joined(results: Path, tmp_path: Path, *lines: dict[str, Any]) -> Costs:
    path = write_bench(tmp_path / "b.csv", list(lines))
    costs = join(compare(results, resamples=20).rows, results, read_results(results), [path])
    assert costs is not None
    return costs


def test_lines_stand_beside_the_unpruned_model_of_their_place(results: Path, tmp_path: Path) -> None:
    more = {"device": "H100", "batch": 8}
    lines = [bench_line("none", 1), bench_line("none", 1, **more), bench_line("none", 1, device="L4")]
    lines += [bench_line("fastv", 0.5, prefill=0.6), bench_line("fastv", 0.5, end_to_end=1.2, **more)]
    costs = joined(results, tmp_path, *lines, bench_line("ivc_prune", 0.25), bench_line("fastv", 0.25))
    assert [(one.variant, one.bench.device, one.bench.batch) for one in costs.lines] == [
        *(("unpruned", "cpu", 1), ("fastv 0.5", "cpu", 1)),
        *(("unpruned", "H100", 8), ("fastv 0.5", "H100", 8)),
    ]
    words = [one.words for one in costs.lines]
    assert words[1] == "50 % of the tokens saved, 40 % of the time of the prefill saved, but no time saved end to end"
    assert words[3] == "50 % of the tokens saved but no time saved in the prefill"
    assert words[0] == words[2] == ""
    assert costs.notes == (
        "No cost of tiny ivc_prune 0.5: its ratio is 0.5, the bench has 0.25.",
        "tiny was evaluated on cpu; its cost is that on H100.",
    )
    text = costs.to_terminal(100)
    assert "a core, bfloat16, sdpa; 64 visual and 10 text tokens in, 8 out" in text
    assert "1.20x [1.19, 1.21] slower" in text
    assert max(map(len, text.splitlines()[1:])) <= 100


def test_a_measurement_counts_once_however_often_it_is_named(results: Path, tmp_path: Path) -> None:
    """The same file twice, by two paths, and a copy of it."""
    lines = [bench_line("none", 1), bench_line("fastv", 0.5), bench_line("ivc_prune", 0.5, quantised="")]
    once = joined(results, tmp_path, *lines)
    path = tmp_path / "b.csv"
    copy = tmp_path / "copy.csv"
    copy.write_bytes(path.read_bytes())
    again = [path, path, tmp_path / "." / "b.csv", tmp_path / ".." / tmp_path.name / "b.csv", copy]
    costs = join(compare(results, resamples=20).rows, results, read_results(results), again)
    assert costs is not None
    assert len(once.lines) == 3
    assert costs.to_json() == once.to_json()
    assert len(costs.files) == 2


def test_the_unpruned_model_of_another_load_stands_beside_nothing(results: Path, tmp_path: Path) -> None:
    """As many requests at a time make a place."""
    lines = [bench_line("none", 1), bench_line("none", 1, batch=4), bench_line("fastv", 0.5, batch=4)]
    found = [(one.variant, one.bench.batch) for one in joined(results, tmp_path, *lines).lines]
    assert found == [("unpruned", 4), ("fastv 0.5", 4)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (bench_line("random", 0.5), "its method is fastv, the bench has random"),
        (bench_line("none", 1), "its method is fastv, the bench has the unpruned model only"),
        (bench_line("fastv", 0.4), "its ratio is 0.5, the bench has 0.4"),
        (bench_line("fastv", 0.5, method_parameters={"layer": 3}), 'parameters are {}, the bench has {"layer":3}'),
        (bench_line("fastv", 0.5, quantised="int8 torchao 1"), "its weights are as they are, the bench has int8"),
        (
            bench_line("fastv", 0.5, decoder={**SIZES, "layers": 28}),
            "its decoder is layers 10, kv_heads 2, head_dim 32, the bench has head_dim 32, hidden 64, kv_heads 2, "
            "layers 28",
        ),
    ],
)
def test_where_nothing_belongs_it_is_said_what_differs(
    results: Path, tmp_path: Path, line: dict[str, Any], why: str
) -> None:
    with pytest.raises(ResultsError, match=r"no line of .* belongs to a variant of") as caught:
        joined(results, tmp_path, line)
    assert why in next(text for text in str(caught.value).splitlines() if "No cost of tiny fastv 0.5" in text)
    assert f"ivcp bench throughput --of {results}" in str(caught.value)


def test_lines_of_other_loads_stand_apart(results: Path, tmp_path: Path) -> None:
    """With half as many in a batch, or answers of other lengths, it is another place."""
    loads: list[dict[str, Any]] = [
        {},
        {"batch": 8, "most_in_batch": 4},
        {"batch": 8, "most_in_batch": 8, "spread": 0.5},
    ]
    lines = [bench_line(name, ratio, **load) for load in loads for name, ratio in (("none", 1), ("fastv", 0.5))]
    costs = joined(results, tmp_path, *lines)
    assert [one.bench.measured_on.partition("in, ")[2] for one in costs.lines[::2]] == [
        *("8 out", "8 out, at most 4 in a batch", "8 out (+/- 50 %)"),
    ]
    assert [one.variant for one in costs.lines] == 3 * ["unpruned", "fastv 0.5"]


def test_variants_rank_where_all_of_them_were_measured(results: Path, tmp_path: Path) -> None:
    """Small requests are many requests: a line of another request says nothing."""
    small = {"visual_tokens": 4, "requests_per_s": 1000.0}
    lines = [bench_line("fastv", 0.5, **small), bench_line("fastv", 0.5, requests_per_s=3.0)]
    lines += [bench_line("fastv", 0.5, batch=4, requests_per_s=5.0), bench_line("ivc_prune", 0.5, requests_per_s=4.0)]
    costs = joined(results, tmp_path, *lines)
    best = [costs.best("tiny", f"{name} 0.5") for name in ("fastv", "ivc_prune")]
    assert [one and one.bench.requests_per_s for one in best] == [5.0, 4.0]
    assert joined(results, tmp_path, lines[0], lines[3]).best("tiny", "fastv 0.5") is None


def test_a_file_beside_the_results_is_found_and_cannot_stop_a_comparison(tmp_path: Path) -> None:
    results = write(tmp_path, LOSSES)
    rows, table = compare(results, resamples=20).rows, read_results(results)
    assert join(rows, results, table) is None
    write_bench(tmp_path / "r.cost.csv", [bench_line("fastv", 0.25)])
    costs = join(rows, results, table)
    assert costs is not None
    assert not costs.lines
    assert len(costs.notes) == 2
    assert "its ratio is 0.5, the bench has 0.25" in costs.to_terminal(200)


def test_sizes_that_the_results_do_not_say_are_taken_and_told(tmp_path: Path) -> None:
    results = write(tmp_path, LOSSES)
    for path in tmp_path.rglob("cell.json"):
        path.unlink()
    costs = joined(results, tmp_path, bench_line("fastv", 0.5))
    assert costs.notes[-1] == "The results do not say the sizes of tiny's decoder; the bench's are taken for them."


def test_other_files_are_refused_with_what_is_wrong(results: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="has no column decoder, requests_per_s: costs are read from what"):
        read_bench(results)
    path = write_bench(tmp_path / "b.csv", [bench_line("fastv", 0.5, requests_per_s=None, note="out of memory")])
    with pytest.raises(ResultsError, match="no line with a measurement"):
        read_bench(path)
    write_bench(path, [bench_line("fastv", 0.5, batch=None)])
    with pytest.raises(ResultsError, match="line 2: a measurement without batch"):
        read_bench(path)
    path.write_text(path.read_text().replace(",64,", ",many,"))
    with pytest.raises(ResultsError, match=r"column 'visual_tokens': .*many"):
        read_bench(path)


def test_the_cheapest_is_who_answers_most_requests(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [bench_line("fastv", 0.5, end_to_end=0.9), bench_line("ivc_prune", 0.5, end_to_end=0.8)]
    path = write_bench(tmp_path / "b.csv", lines)
    assert decide(results, Policy(3)).cheapest == {"tiny": ("fastv 0.5", "measured time end to end")}
    decision = decide(results, Policy(3), bench=[path])
    assert decision.cheapest == {"tiny": ("ivc_prune 0.5", "requests per hour of one device, measured by the bench")}
    assert [round(one.requests_per_hour) for one in decision.verdicts] == [8000, 9000]
    assert json.loads(json.dumps(decision.to_json()))["costs"][0]["requests_per_hour"] == pytest.approx(8000)
    for verb in (["decide", str(results), "--margin", "3"], ["compare", str(results), "--resamples", "20"]):
        assert main([*verb, "--cost", str(path)]) == 0
        assert "requests/h" in (shown := capsys.readouterr().out)
        assert "Cost, measured by `ivcp bench throughput`" in shown


def test_tokens_saved_without_time_are_named_where_times_were_paired(tmp_path: Path) -> None:
    """With twice the fixture's times fastv takes 1.4 of the unpruned model's, random just as long."""
    results = write(tmp_path, {**LOSSES, ("random", "a"): 9}, ratio_layer_mean=0.5)
    for name in ("random", "fastv"):
        path = tmp_path / name / "a" / "timing.json"
        timing = json.loads(path.read_text())
        for sample in timing["samples"]:
            sample["prefill_ms"] *= 2
        path.write_text(json.dumps(timing))
    lines = (
        "tiny fastv 0.5: 50 % of the tokens saved but no time saved: the prefill is slower (a)",
        "tiny random 0.5: 50 % of the tokens saved but no time saved in the prefill (a)",
    )
    shown = compare(results, resamples=20).to_terminal(500)
    assert all(line in shown for line in lines)
    assert decide(results, Policy(3)).notes == lines
