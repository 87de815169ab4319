"""A verdict needs a rule, is right as often as it says, and never comes from missing or random evidence."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivcp_eval.cli import main
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.stats.margins import clusters_to_decide, loss_test
from ivcp_eval.reports.table import make_row, read_results, write_results, write_samples
from ivcp_eval.reports.views.decision import Policy, decide
from tests.reports.bench_lines import bench_line, write_bench

N = 1000


def write(folder: Path, losses: dict[tuple[str, str], int], **more: Any) -> Path:
    """Results of (method, benchmark) -> answers lost of 1,000; each benchmark has a baseline of 800 right."""
    rows = []
    for (method, benchmark), lost in {**{("none", b): 0 for _, b in losses}, **losses}.items():
        place = f"{method}/{benchmark}"
        (folder / place).mkdir(parents=True)
        scores = np.zeros(N)
        scores[lost : 800 + (5 if lost else 0)] = 1  # every variant also gains a few
        write_samples(
            folder / place / "predictions.csv",
            [{"index": i, "prediction": str(s), "score": s} for i, s in enumerate(scores)],
        )
        factor = {"none": 1.0, "fastv": 0.7, "random": 0.5}.get(method, 0.9)
        samples = [
            {"index": str(i), "prefill_ms": 10 * factor * (1 + i % 3), "end_to_end_ms": 50 * factor} for i in range(8)
        ]
        (folder / place / "timing.json").write_text(json.dumps({"session": "s", "samples": samples}))
        sizes = {"layers": 10, "kv_heads": 2, "head_dim": 32, "value_dim": None}
        (folder / place / "cell.json").write_text(json.dumps({"identity": {}, "decoder": sizes}))
        own = {
            "model": "tiny", "method": method, "benchmark": benchmark, "metric": "accuracy", "status": "ok",
            "score": 100 * scores.mean(), "score_scale": 100, "ratio_asked": 1.0 if method == "none" else 0.5,
            "ratio_kv_cache": 1.0 if method == "none" else 0.5, "visual_tokens_prompt_mean": 64.0, "dtype": "bfloat16",
            "n_samples": N, "run_id": place, "predictions": f"{place}/predictions.csv", "trained_weights": True,
        }  # fmt: skip
        rows.append(make_row(**{**own, **more}))
    write_results(folder / "r.csv", rows)
    return folder / "r.csv"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    losses = {"fastv": (10, 12), "ivc_prune": (6, 8), "random": (250, 30), "uniform": (31, 15)}
    return write(tmp_path, {(m, b): lost for m, of in losses.items() for b, lost in zip("ab", of, strict=True)})


def test_verdicts_savings_and_the_cheapest(results: Path) -> None:
    decision = decide(results, Policy(3))
    words = {one.variant.split()[0]: one.word for one in decision.verdicts}
    assert words == {"fastv": "GO", "ivc_prune": "GO", "random": "NO-GO", "uniform": "UNDECIDED"}
    assert decision.cheapest == {"tiny": ("fastv 0.5", "measured time end to end")}
    assert decision.exit_code == 0
    fastv, _, random, uniform = decision.verdicts
    assert (fastv.prefill, fastv.end_to_end) == pytest.approx((0.7, 0.7))
    assert fastv.kv_bytes_saved == 64 * 0.5 * 10 * 2 * 64 * 2
    assert (random.benchmark, random.difference) == ("a", pytest.approx(-24.5))
    assert uniform.more_samples > 0
    assert "more of a would make it GO" in uniform.why
    assert "Cheapest that passes, tiny: fastv 0.5" in decision.to_terminal(100)
    assert max(map(len, decision.to_terminal(100).splitlines()[3:12])) <= 100


def test_a_variant_is_corrected_for_those_beside_it(tmp_path: Path) -> None:
    """A loss of 25 of 1,000 passes at a margin of 30 alone, with p 0.03; not as one of two, whichever is asked for."""
    alone = write(tmp_path / "alone", {("fastv", "a"): 25})
    pair = write(tmp_path / "pair", {("fastv", "a"): 25, ("random", "a"): 26})
    (one,) = decide(alone, Policy(3)).verdicts
    assert (one.word, one.p_go) == ("GO", pytest.approx(0.035, abs=0.005))
    of_two, _ = decide(pair, Policy(3)).verdicts
    assert (of_two.word, of_two.p_go) == ("UNDECIDED", pytest.approx(2 * one.p_go))
    assert decide(pair, Policy(3), method="fastv", ratio=0.5).verdicts == (of_two,)
    with pytest.raises(ValueError, match=r"no variant is fastv 0\.3; the results have fastv 0\.5, random 0\.5"):
        decide(pair, Policy(3), method="fastv", ratio=0.3)


def test_a_failure_is_corrected_over_variants_and_benchmarks(tmp_path: Path) -> None:
    """A loss of 50 of 1,000 fails a margin of 30 alone, with p 0.02; as one of two; not as one of two on two each."""
    words = []
    for folder, losses in (("1", {("fastv", "a"): 50}), ("2", {("fastv", "a"): 50, ("random", "a"): 20})):
        words.append(decide(write(tmp_path / folder, losses), Policy(3)).verdicts[0].word)
    four = write(tmp_path / "4", {(m, b): 50 if m + b == "fastva" else 20 for m in ("fastv", "random") for b in "ab"})
    words.append(decide(four, Policy(3)).verdicts[0].word)
    assert words == ["NO-GO", "NO-GO", "UNDECIDED"]
    three = write(tmp_path / "3", {("fastv", "a"): 50, ("random", "a"): 20, ("uniform", "a"): 20})
    assert decide(three, Policy(3)).verdicts[0].word == "UNDECIDED", "variants count, with one benchmark each"


def test_the_bound_beside_a_verdict_agrees_with_it(results: Path) -> None:
    for margin in (1, 2, 3, 5):
        for one in decide(results, Policy(margin)).verdicts:
            assert (one.word == "GO") == (one.lowest > -margin)
            assert (one.word == "NO-GO") == (one.highest < -margin)
            losing = one.word == "NO-GO" or (one.word == "UNDECIDED" and one.difference < -margin)
            assert (f"at most {one.highest:+.2f} %" if losing else f"at least {one.lowest:+.2f} %") in one.why


def test_more_samples_of_every_benchmark_that_does_not_pass_yet(tmp_path: Path) -> None:
    losses = {("fastv", "a"): 28, ("fastv", "b"): 30, ("fastv", "c"): 0}
    (one,) = decide(write(tmp_path / "go", losses), Policy(3)).verdicts
    expected = {}
    for name, lost in (("a", 28), ("b", 30)):
        difference, changed = (5 - lost) / N, (5 + lost) / N
        error = np.sqrt(max(changed - difference**2, 0.03 * 0.97) / N)
        expected[name] = clusters_to_decide(difference, error, N, 0.03, 0.05) - N
    found = {
        word.split(" more of ")[1]: int(word.split()[0]) for word in one.why.split("about ")[1][:-17].split(" and ")
    }
    assert one.why.endswith(" would make it GO")
    assert found == pytest.approx(expected, rel=0.05)
    assert one.more_samples == pytest.approx(sum(expected.values()), rel=0.05)
    pair = {**losses, ("random", "a"): 0, ("random", "b"): 0, ("random", "c"): 0}
    of_two = decide(write(tmp_path / "two", pair), Policy(3), method="fastv").verdicts[0]
    assert of_two.more_samples > 1.2 * one.more_samples, "tested at half the level"
    (losing,) = decide(write(tmp_path / "no", {("fastv", "a"): 45, ("fastv", "b"): 40}), Policy(3)).verdicts
    assert losing.why.endswith(" more of a would make it NO-GO")


def test_more_samples_are_counted_in_samples_not_in_clusters(tmp_path: Path) -> None:
    """The same answers, each asked twice: the same evidence, and twice as many more are needed."""
    single = write(tmp_path / "single", {("fastv", "a"): 28})
    (once,) = decide(single, Policy(3)).verdicts
    rows = list(csv.DictReader((tmp_path / "single" / "r.csv").open()))
    for row in rows:
        path = tmp_path / "single" / row["predictions"]
        samples = list(csv.DictReader(path.open()))
        doubled = [
            {
                "index": f"{s['index']}.{turn}",
                "prediction": s["prediction"],
                "score": float(s["score"]),
                "cluster": s["index"],
            }
            for s in samples
            for turn in (0, 1)
        ]
        write_samples(path, doubled)
    (twice,) = decide(single, Policy(3)).verdicts
    assert twice.p_go == pytest.approx(once.p_go, rel=0.1)
    assert twice.more_samples == pytest.approx(2 * once.more_samples, rel=0.1)


def test_what_is_saved_follows_the_precision(tmp_path: Path) -> None:
    """Half precision beside full: half of the bytes, from the row of its own."""
    path = write(tmp_path, {("fastv", "a"): 2}, dtype="float32")
    rows = read_results(path)
    write_results(path, [*rows, *({**row, "dtype": "bfloat16", "run_id": f"half {row['run_id']}"} for row in rows)])
    full, half = decide(path, Policy(5)).verdicts
    assert full.kv_bytes_saved == 2 * half.kv_bytes_saved > 0


def test_few_timed_samples_choose_no_cheapest(tmp_path: Path) -> None:
    path = write(tmp_path, {("fastv", "a"): 2, ("ivc_prune", "a"): 2}, ratio_flops=0.6)
    assert decide(path, Policy(5)).cheapest == {"tiny": ("fastv 0.5", "measured time end to end")}
    for file in tmp_path.glob("*/a/timing.json"):
        known = json.loads(file.read_text())
        file.write_text(json.dumps({**known, "samples": known["samples"][:7]}))
    few = decide(path, Policy(5))
    assert few.verdicts[0].timed_samples == 7
    assert few.cheapest == {"tiny": ("fastv 0.5", "measured FLOPs of the prefill")}


def test_the_benchmark_timed_least_says_how_many_samples_were_timed(tmp_path: Path) -> None:
    path = write(tmp_path, {("fastv", "a"): 2, ("fastv", "b"): 2}, ratio_flops=0.6)
    for method in ("none", "fastv"):
        file = tmp_path / method / "b" / "timing.json"
        known = json.loads(file.read_text())
        file.write_text(json.dumps({**known, "samples": known["samples"][:3]}))
    decision = decide(path, Policy(5))
    assert decision.verdicts[0].timed_samples == 3
    assert decision.cheapest == {"tiny": ("fastv 0.5", "measured FLOPs of the prefill")}


def test_a_server_s_time_to_the_first_token_stands_in_the_table(tmp_path: Path) -> None:
    """Of answers by a server nobody can tell the prefill apart."""
    path = write(tmp_path, {("fastv", "a"): 6})
    assert "first token" not in decide(path, Policy(3)).to_terminal(999)
    for method, ms in (("none", 10.0), ("fastv", 6.0)):
        times = [{"index": str(i), "first_token_ms": ms, "end_to_end_ms": 40.0} for i in range(8)]
        (tmp_path / method / "a" / "timing.json").write_text(json.dumps({"session": "s", "samples": times}))
    text = decide(path, Policy(3)).to_terminal(999)
    assert "first token" in text
    assert "0.60x" in text
    assert "time: prefill" not in text


def test_more_samples_for_a_no_go_are_counted_at_the_level_it_is_tested_at(tmp_path: Path) -> None:
    """Over variants and benchmarks: of two variants on two benchmarks at a quarter of alpha."""
    lost = {("fastv", "a"): 45, ("fastv", "b"): 0, ("random", "a"): 0, ("random", "b"): 0}
    one = decide(write(tmp_path, lost), Policy(3), method="fastv").verdicts[0]
    assert one.why.endswith("more of a would make it NO-GO")
    difference, changed = (5 - 45) / N, (5 + 45) / N
    error = np.sqrt((changed - difference**2) / (N - 1))
    needed = {level: clusters_to_decide(difference, error, N, 0.03, level) - N for level in (0.05, 0.025, 0.0125)}
    assert one.more_samples == pytest.approx(needed[0.0125], rel=0.05)
    assert needed[0.025] < 0.9 * needed[0.0125], "the test tells the levels apart"


def test_nothing_is_said_of_other_variants_than_the_one_asked_for(tmp_path: Path) -> None:
    """Their failures, times, costs and skipped rows are not what was asked for; all count in the correction."""
    path = write(tmp_path, {("fastv", "a"): 6, ("random", "a"): 250}, ratio_layer_mean=0.5)
    slow = tmp_path / "random" / "a" / "timing.json"
    times = json.loads(slow.read_text())
    slower = [{**one, "prefill_ms": 90 * (1 + i / 100)} for i, one in enumerate(times["samples"])]
    slow.write_text(json.dumps({**times, "samples": slower}))
    rows = read_results(path)
    skipped = {"status": "skipped", "score": None, "reason": "no such layer"}
    rows += [{**rows[-1], **skipped, "run_id": name, "method": name} for name in ("divprune", "uniform")]
    forced = [{**row, "max_new_tokens": 9 if row["method"] == "random" else None} for row in rows]
    write_results(path, forced)
    write_bench(tmp_path / "r.cost.csv", [bench_line("none", 1.0), bench_line("random", 0.5, end_to_end=0.5)])
    whole = decide(path, Policy(3), force=True)
    assert {len(whole.notes), len(whole.left_out)} == {2}, "forced, no time saved; two skipped"
    assert [one.variant for one in whole.costs.lines] == ["unpruned", "random 0.5"]
    for method, of_random in (("fastv", False), ("random", True)):
        one = decide(path, Policy(3), force=True, method=method)
        assert one.verdicts == tuple(v for v in whole.verdicts if v.variant.startswith(method))
        other = {"fastv", "random", "divprune", "uniform"} - {method}
        for text in (one.to_terminal(999), json.dumps(one.to_json())):
            assert not [name for name in other if f"{name} 0.5" in text], text
        assert bool(one.notes) == of_random
        assert bool(one.costs and one.costs.lines) == of_random
    assert "no such layer" in decide(path, Policy(3), force=True, method=None).to_terminal(999)


def test_part_of_a_benchmark_is_another_variant_with_another_name(tmp_path: Path) -> None:
    path = write(tmp_path, {("fastv", "a"): 6})
    rows = read_results(path)
    write_results(path, [*rows, *({**row, "limit": 40, "run_id": f"few {row['run_id']}"} for row in rows)])
    assert [one.variant for one in decide(path, Policy(3)).verdicts] == ["fastv(all rows) 0.5", "fastv(first 40) 0.5"]


def test_only_critical_benchmarks_decide(results: Path) -> None:
    word = {one.variant: one.word for one in decide(results, Policy(5, critical=("b",))).verdicts}
    assert word["random 0.5"] == "GO"
    with pytest.raises(ValueError, match="unknown critical benchmark 'c'"):
        decide(results, Policy(5, critical=("c",)))


def test_missing_few_or_random_evidence_is_no_go_either_way(tmp_path: Path) -> None:
    path = write(tmp_path / "missing", {("fastv", "a"): 2, ("fastv", "b"): 2, ("random", "a"): 2})
    words = {one.variant: (one.word, one.why) for one in decide(path, Policy(5)).verdicts}
    assert words["fastv 0.5"][0] == "GO"
    assert words["random 0.5"][0] == "UNDECIDED"
    assert words["random 0.5"][1].startswith("no row of b")
    (few,) = decide(path, Policy(5, critical=("b",), minimum_n=N + 7), method="fastv").verdicts
    assert (few.word, few.why[:38]) == ("UNDECIDED", "fewer than 1007 samples of b (7 more n")
    (enough,) = decide(path, Policy(5, critical=("b",), minimum_n=N), method="fastv").verdicts
    assert enough.word == "GO"
    untrained = write(tmp_path / "untrained", {("fastv", "a"): 2}, trained_weights=False)
    assert [one.word for one in decide(untrained, Policy(5)).verdicts] == ["UNDECIDED"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--margin", "3"], 0),
        (["--margin", "3", "--method", "random"], 1),
        (["--margin", "3", "--method", "uniform"], 3),
        (["--margin", "1"], 3),  # some are NO-GO, some undecided
    ],
)
def test_exit_codes(results: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int) -> None:
    assert main(["decide", str(results), *options]) == code
    assert "Rule: GO if on every benchmark" in capsys.readouterr().out


def test_no_rule_no_verdict(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["decide", str(results)])
    assert stop.value.code == 2
    for verb in ("decide", "compare", "report"):
        for margin in ("0", "-1", "nan", "100"):
            with pytest.raises(SystemExit, match="2"):
                main([verb, str(results), f"--margin={margin}"])
            assert "above 0 and below 100" in capsys.readouterr().err
    policy = tmp_path / "policy.yaml"
    for text, said in (
        ("alpha: 0.1\n", "margin is missing"),
        ("margin: 1\nmargn: 2\n", "line 2: unknown key 'margn'"),
        ("margin: 1\nminimum_n: -5\n", "got -5"),
    ):
        policy.write_text(text)
        assert main(["decide", str(results), "--policy", str(policy)]) == 2
        assert said in capsys.readouterr().err


def test_a_registered_policy_stands_in_the_output(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("margin: 3\nalpha: 0.01\ncritical: [a]\nminimum_n: 500\n")
    assert main(["decide", str(results), "--policy", str(policy), "--alpha", "0.2"]) == 2, "no flag softens it"
    capsys.readouterr()
    assert main(["decide", str(results), "--policy", str(policy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    digest = hashlib.sha256(policy.read_bytes()).hexdigest()
    assert found["policy"] == {"margin": 3, "alpha": 0.01, "critical": ["a"], "minimum_n": 500, "sha256": digest}
    assert main(["decide", str(results), "--policy", str(policy), "--csv"]) == 0
    lines = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {line["policy_sha256"] for line in lines} == {digest}
    assert [line["word"] for line in lines] == [one["word"] for one in found["verdicts"]]


@pytest.mark.parametrize(
    ("n", "margin", "gains"), [(100, 0.03, 0.0), (400, 0.03, 0.0), (400, 0.02, 0.05), (2000, 0.01, 0.02)]
)
def test_false_go_at_the_margin_is_at_most_alpha(n: int, margin: float, gains: float) -> None:
    """Truth at the margin: losses exceed gains by exactly it, where hardly anything changes too."""
    trials = 4000
    drawn = np.random.default_rng(0).multinomial(n, [margin + gains, gains, 1 - margin - 2 * gains], trials)
    lost, gained = drawn[:, 0], drawn[:, 1]
    false_go = 0
    for b, c in zip(lost, gained, strict=True):
        difference = (c - b) / n
        error = np.sqrt((b + c) / n - difference**2) / np.sqrt(n)
        test = loss_test(difference, error, n, margin, 1)
        assert test is not None
        false_go += test.p_not_worse <= 0.05
        assert (test.lowest(0.05) > -margin) == (test.p_not_worse < 0.05)
        assert (test.highest(0.05) < -margin) == (test.p_worse < 0.05)
    assert false_go / trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_a_loss_is_tested_as_by_scipy() -> None:
    """Student's test of the samples, whose bootstrap error divides by n."""
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(3).normal(-0.3, 1.0, 12)
    test = loss_test(
        values.mean(),
        values.std() / np.sqrt(12),
        12,
        0.5,
        1,
    )
    assert test is not None
    assert test.p_not_worse == pytest.approx(ttest_1samp(values, -0.5, alternative="greater").pvalue)
    assert test.p_worse == pytest.approx(ttest_1samp(values, -0.5, alternative="less").pvalue)
    with pytest.raises(ValueError, match="margin"):
        loss_test(0.0, 1.0, 12, 0.0, 1)


def test_power_is_what_the_number_of_samples_promises() -> None:
    """With as many clusters as asked for, a true difference of the observed size is decided in 80 of 100 runs."""
    generator, spread, truth, margin = np.random.default_rng(1), 0.4, -0.005, 0.03
    n = int(clusters_to_decide(truth, spread / 10, 100, margin, 0.05))
    passed = 0
    for _ in range(1000):
        values = generator.normal(truth, spread, n)
        test = loss_test(values.mean(), values.std() / np.sqrt(n), n, margin, 1)
        passed += test is not None and test.p_not_worse <= 0.05
    assert passed / 1000 == pytest.approx(0.8, abs=0.04)


def test_any_false_go_among_many_variants_is_as_rare(tmp_path: Path) -> None:
    """Twenty variants at the margin: Holm holds the chance that any of them passes."""
    from ivcp_eval.reports.stats import holm

    generator, n, margin = np.random.default_rng(2), 500, 0.04
    families = 0
    for _ in range(600):
        p_values = []
        for b, c in generator.multinomial(n, [0.09, 0.05, 0.86], 20)[:, :2]:
            difference = (c - b) / n
            test = loss_test(difference, np.sqrt((b + c) / n - difference**2) / np.sqrt(n), n, margin, 1)
            assert test is not None
            p_values.append(test.p_not_worse)
        families += holm(p_values).min() <= 0.05
    assert families / 600 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)


def test_agreement_is_never_called_right_or_wrong(results: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "agreement", {("fastv", "a"): 2}, metric="agreement")
    text = compare(path, resamples=100).to_terminal(999)
    assert (
        "Flips of agreement: answers that agree less / more with the unpruned model's, be they right or wrong." in text
    )
    assert "right -> wrong" not in text
    assert decide(path, Policy(5)).notes == ("agreement: agreement with the unpruned model's answers, not accuracy.",)
    assert "right -> wrong" in compare(results, resamples=100).to_terminal(999)
    assert decide(results, Policy(5)).notes == ()
