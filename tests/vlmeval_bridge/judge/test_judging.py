"""From stored answers over a real judge's server to VLMEvalKit's scores, and again with another judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval import benchmarks
from ivcp_eval.files import file_digest
from ivcp_eval.reports.schema import SAMPLE_COLUMN_NAMES
from ivcp_eval.reports.table import make_row, read_results, read_samples, write_results, write_samples
from ivcp_eval.vlmeval_bridge.judge import Judge, JudgeConfig, JudgeUnreachable
from tests.vlmeval_bridge.conftest import Laboratory
from tests.vlmeval_bridge.judge.server import Reply, Server, completion, error, serve
from tests.vlmeval_bridge.miniatures import miniatures

UNCLEAR = "Well, who could tell?"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(server: Server, folder: Path, **changes: Any) -> Judge:
    return Judge(JudgeConfig("gpt-4o", server.url, retries=0, **changes), folder)


def says(answer: Callable[[str], str]) -> Callable[[dict[str, Any], int], Reply]:
    return lambda body, n: completion(answer(body["messages"][-1]["content"]))


def metric(scored: Any, name: str) -> float:
    return float(scored.metrics[name][0])


def test_mmvet_over_the_wire(laboratory: Laboratory, tmp_path: Path):
    miniature = miniatures()["MMVet"]

    def answer(prompt: str) -> str:
        return "0.4" if "middling" in prompt else ("1.0" if "| good" in prompt else "0.0")

    with serve(says(answer)) as server:
        rater = judge(server, tmp_path)
        scored, rows = laboratory.score("MMVet", miniature.half, rater)
        assert metric(scored, "score") == pytest.approx(36)
        assert [row["score"] for row in rows] == [1, 0.4, 0, 0.4, 0]
        assert scored.judge_failures == 0
        sent = len(server.prompts)
        assert sent == 5
        assert "Tell me about 0. | x <AND> y | good 0 | " in "\n".join(server.prompts).replace("  ", " ")
        # The pruned model gave four of the same answers: one more request.
        laboratory.score("MMVet", {**miniature.half, "v1_0": "bad 0"}, rater)
        assert len(server.prompts) == sent + 1


def test_an_unrated_answer_is_left_out_and_counted(laboratory: Laboratory, tmp_path: Path):
    with serve(says(lambda prompt: "no idea" if "bad 4" in prompt else "1.0")) as server:
        scored, rows = laboratory.score("MMVet", miniatures()["MMVet"].half, judge(server, tmp_path))
    assert metric(scored, "score") == 100
    assert scored.judge_failures == 1
    assert [row["score"] for row in rows] == [1, 1, 1, 1, None]
    assert "could not rate 1 answers" in scored.remark


def test_a_judge_that_is_down_gives_no_score(laboratory: Laboratory, tmp_path: Path):
    for name in ("MMVet", "MMStar", "POPE"):
        with serve(lambda body, n: error(503, "overloaded")) as server, pytest.raises(JudgeUnreachable):
            laboratory.score(name, dict.fromkeys(miniatures()[name].right, UNCLEAR), judge(server, tmp_path))


@pytest.mark.parametrize("name", ["MMStar", "BLINK", "MMMU_DEV_VAL", "CV-Bench-2D", "POPE", "MME", "HallusionBench"])
def test_readable_answers_are_never_sent(laboratory: Laboratory, tmp_path: Path, name: str):
    miniature = miniatures()[name]
    with serve(says(lambda prompt: "A")) as server:
        scored, _ = laboratory.score(name, miniature.half, judge(server, tmp_path))
        assert server.requests == []
    assert {m: s for m, (s, _) in scored.metrics.items()} == pytest.approx(
        {m: v[2] for m, v in miniature.scores.items()}
    )
    assert scored.judge_failures == 0


def test_unreadable_options_are_read_by_the_judge(laboratory: Laboratory, tmp_path: Path):
    miniature = miniatures()["MMStar"]
    answers = {**miniature.right, "0": "the one like blood", "1": "something else", "2": "gibberish"}
    exact, _ = laboratory.score("MMStar", answers)
    assert metric(exact, "accuracy") == 25

    def answer(prompt: str) -> str:
        own = prompt.rpartition("Example 3:")[2]
        if "gibberish" in own:
            return "???"
        return "A" if "like blood" in own else "Z"

    with serve(says(answer)) as server:
        scored, rows = laboratory.score("MMStar", answers, judge(server, tmp_path))
        assert len(server.prompts) == 3 + 2, "three questions, one of them three times"
    # 0 and 3 right, 1 wrong (the judge says: none of the options), 2 unrated: two of three.
    assert metric(scored, "accuracy") == pytest.approx(200 / 3)
    assert [row["score"] for row in rows] == [1, 0, None, 1]


def test_a_rotation_that_is_wrong_saves_the_others(laboratory: Laboratory, tmp_path: Path):
    miniature = miniatures()["MMBench_DEV_EN_V11"]
    answers = dict(miniature.right)
    answers |= {"0": UNCLEAR, "1000000": miniature.wrong["1000000"]}  # question 0 is lost for certain
    answers |= {"1": UNCLEAR + " 1"}
    with serve(says(lambda prompt: "A")) as server:
        scored, rows = laboratory.score("MMBench_DEV_EN_V11", answers, judge(server, tmp_path))
        assert len(server.prompts) == 1
    assert metric(scored, "accuracy") == 75
    assert {row["index"]: row["score"] for row in rows}["1"] == 1


def test_an_unrated_rotation_takes_its_question_along(laboratory: Laboratory, tmp_path: Path):
    miniature = miniatures()["MMBench_DEV_EN_V11"]
    answers = {**miniature.half, "1": UNCLEAR}
    with serve(says(lambda prompt: "???")) as server:
        scored, rows = laboratory.score("MMBench_DEV_EN_V11", answers, judge(server, tmp_path))
    assert metric(scored, "accuracy") == pytest.approx(100 / 3)
    assert scored.judge_failures == 2
    assert [row["index"] for row in rows if row["score"] is None] == ["1", "1000001"]


def test_yes_and_no_are_read_by_the_judge(laboratory: Laboratory, tmp_path: Path):
    miniature = miniatures()["POPE"]
    answers = {**miniature.right, "0": "It is visible.", "3": "Hard to say."}
    assert metric(laboratory.score("POPE", answers)[0], "accuracy") == 40
    with serve(says(lambda p: "Yes" if "visible" in p.rpartition("Example 3")[2] else "Unknown")) as server:
        scored, rows = laboratory.score("POPE", answers, judge(server, tmp_path))
        assert len(server.prompts) == 2
    # "Unknown" is a verdict: the answer is neither, hence wrong.
    assert metric(scored, "accuracy") == 70
    assert scored.judge_failures == 0
    assert [row["score"] for row in rows] == [1, 1, 1, 0, 1, 1]


def test_an_unrated_answer_of_mme_takes_its_pair_along(laboratory: Laboratory, tmp_path: Path):
    miniature = miniatures()["MME"]
    with serve(says(lambda prompt: "???")) as server:
        scored, rows = laboratory.score("MME", {**miniature.right, "5": UNCLEAR}, judge(server, tmp_path))
    assert metric(scored, "total") == 2800
    assert [row["index"] for row in rows if row["score"] is None] == ["4", "5"]


def test_mathvista_sends_only_what_cannot_be_read(laboratory: Laboratory, tmp_path: Path):
    miniature = miniatures()["MathVista_MINI"]
    with serve(says(lambda prompt: "1.5")) as server:
        scored, _ = laboratory.score("MathVista_MINI", miniature.right, judge(server, tmp_path))
        assert len(server.prompts) == 2  # the choice and the whole number were read by rule
    assert metric(scored, "accuracy") == 75


def test_llavabench_asks_for_two_ratings(laboratory: Laboratory, tmp_path: Path):
    miniature = miniatures()["LLaVABench"]
    with serve(says(lambda prompt: "8 10\nAssistant 2 ...")) as server:
        scored, _ = laboratory.score("LLaVABench", miniature.right, judge(server, tmp_path))
        assert server.requests[-1]["messages"][0]["role"] == "system"
    assert metric(scored, "relative score") == 125


# -- how verdicts are written ---------------------------------------------------------------------------------------

SHARES = {
    "**0.8**": 0.8, "0.8.": 0.8, "Score: 0.8/1": 0.8, "0.8 / 1.0": 0.8, "| 0.8 |": 0.8, "`.8`": 0.8, "1.": 1.0,
    "**Correctness:** 0.8": 0.8, "The final score is 0.8.": 0.8, "<think>0.1 or 1.0?</think>\n\n0.8": 0.8,
    "8/10": None, "0.8/10": None, "0.8 or 0.9": None, "1.5": None, "-0.8": None, "nan": None, "0,8": None, "0_8": None,
    "<think>0.8": None,
}  # fmt: skip


@pytest.mark.parametrize(("reply", "share"), SHARES.items())
def test_ratings_of_mmvet(laboratory: Laboratory, tmp_path: Path, reply: str, share: float | None):
    answers = miniatures()["MMVet"].half
    unsure = next(iter(answers.values()))
    with serve(says(lambda p: reply if p.rstrip(" |").endswith(f"| {unsure}") else "0.0")) as server:
        _, rows = laboratory.score("MMVet", answers, judge(server, tmp_path))
    assert rows[0]["score"] == share


@pytest.mark.parametrize("line", ["**8 10**", "8, 10.", "8/10 10/10", "Scores: 8 10", "<think>1 1</think>**8** **10**"])
def test_ratings_of_llavabench(laboratory: Laboratory, tmp_path: Path, line: str):
    with serve(says(lambda prompt: f"{line}\nAssistant 2 knows more.")) as server:
        scored, _ = laboratory.score("LLaVABench", miniatures()["LLaVABench"].right, judge(server, tmp_path))
        assert server.requests[-1]["max_tokens"] == 2048, "the explanation that follows is asked for, too"
    assert metric(scored, "relative score") == 125


@pytest.mark.parametrize("line", ["**1.5**", "1.5.", "Extracted answer: 1.5", "<think>15?</think>1.5"])
def test_answers_extracted_for_mathvista(laboratory: Laboratory, tmp_path: Path, line: str):
    with serve(says(lambda prompt: line)) as server:
        scored, _ = laboratory.score("MathVista_MINI", miniatures()["MathVista_MINI"].right, judge(server, tmp_path))
    assert metric(scored, "accuracy") == 75


@pytest.mark.parametrize("mark", ["**{}**", '"{}"', "`{}`", "{}.", "Answer: {}", "<think>B? No.</think>{}"])
def test_options_and_yes_or_no(laboratory: Laboratory, tmp_path: Path, mark: str):
    for name, said in (("MMStar", "A"), ("POPE", "Yes")):
        miniature = miniatures()[name]
        with serve(says(lambda prompt, said=said: mark.format(said))) as server:  # type: ignore[misc]
            answers = {**miniature.right, "0": UNCLEAR}
            scored, rows = laboratory.score(name, answers, judge(server, tmp_path))
        assert (rows[0]["score"], scored.judge_failures) == (1, 0)


# -- rejudge --------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(laboratory: Laboratory, tmp_path: Path) -> Path:
    """A results CSV with two judged benchmarks and one that nobody judges."""
    rows = []
    for name, answers in (
        ("MMVet", miniatures()["MMVet"].half),
        ("MMStar", {**miniatures()["MMStar"].right, "0": UNCLEAR}),
        ("TextVQA_VAL", miniatures()["TextVQA_VAL"].half),
    ):
        dataset = laboratory.dataset(name)
        path = tmp_path / "runs" / name / "predictions.csv"
        stored = [
            {**dict.fromkeys(SAMPLE_COLUMN_NAMES), "index": str(i), "prediction": answers[str(i)], "score": 0.0}
            for i in dataset.data["index"]
        ]  # fmt: skip
        write_samples(path, stored)
        common = {"model": "m", "method": "none", "benchmark": name, "status": "ok", "n_failed": 0, "run_id": name}
        common |= {"benchmark_sha256": file_digest(laboratory.root / f"{name}.tsv")}
        rows.append(make_row(**common, metric="x", score=1.0, score_scale=100, judge="old@1", predictions=str(
            path.relative_to(tmp_path))))  # fmt: skip
    write_results(tmp_path / "r.csv", rows)
    return tmp_path / "r.csv"


def test_stored_answers_are_rated_again(results: Path, tmp_path: Path):
    from ivcp_eval.runs.records.rejudge import estimate_rejudge, rejudge

    before = results.read_bytes()
    with serve(says(lambda prompt: "A" if "several options" in prompt else "0.5")) as server:
        config = JudgeConfig("other", server.url)
        cost = estimate_rejudge(results, config, tmp_path / "cache", price=(10.0, 10.0))
        assert server.requests == []
        assert (cost.calls, cost.cached) == (6, 0)
        assert 1000 < cost.tokens_in < 10_000
        assert cost.dollars == pytest.approx((cost.tokens_in + cost.tokens_out) * 1e-5)
        outcome = rejudge(results, config, tmp_path / "cache", tmp_path / "new" / "new.csv")
        assert len(server.prompts) == 6
        assert estimate_rejudge(results, config, tmp_path / "cache").calls == 0
    assert (outcome.rated, outcome.kept, outcome.problems) == (2, 1, [])
    rows = {row["benchmark"]: row for row in read_results(outcome.csv)}
    assert (rows["MMVet"]["score"], rows["MMVet"]["metric"]) == (50, "score")
    assert (rows["MMStar"]["score"], rows["MMStar"]["judge_failures"]) == (100, 0)
    assert rows["MMVet"]["judge"].endswith("@other")
    assert rows["MMVet"]["run_id"] != "MMVet"
    assert rows["TextVQA_VAL"]["judge"] == "old@1"
    for name, expected in (("MMVet", [0.5] * 5), ("MMStar", [1] * 4), ("TextVQA_VAL", [0] * 4)):
        samples = read_samples(outcome.csv.parent / rows[name]["predictions"])
        assert [sample["score"] for sample in samples] == expected
    assert results.read_bytes() == before


def test_a_failing_judge_writes_nothing(results: Path, tmp_path: Path):
    from ivcp_eval.runs.records.rejudge import rejudge

    with serve(lambda body, n: error(401, "no")) as server, pytest.raises(RuntimeError, match="refuses"):
        rejudge(results, JudgeConfig("other", server.url), tmp_path / "cache")
    assert not list(tmp_path.glob("r.rejudged-*"))


def test_the_verb(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    import argparse

    from ivcp_eval.cli import add_common
    from ivcp_eval.cli.running import rejudge as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    add_common(parser)
    parser.set_defaults(quiet=False)
    common = [str(results), "--cache", str(tmp_path / "cache")]
    with serve(says(lambda prompt: "A" if "several options" in prompt else "0.5")) as server:
        address = ["--judge", "other", "--judge-url", server.url]
        assert command.run(parser.parse_args([*common, *address, "--estimate"])) == 0
        assert "6 calls" in capsys.readouterr().out
        assert command.run(parser.parse_args([*common, *address, "--data", "MMVet"])) == 0
        assert "1 cells rated, 2 rows taken over" in capsys.readouterr().out
        options = ["--judge-options", "max_completion_tokens=900", "temperature=None"]
        assert command.run(parser.parse_args([*common, *address, *options, "--data", "MMVet"])) == 0
        sent = server.requests[-1]
        assert sent["max_completion_tokens"] == 900
        assert not {"max_tokens", "temperature"} & set(sent)
        assert command.run(parser.parse_args([*common, *address, *options, "--estimate", "--data", "MMStar"])) == 0
        assert "at most 900 out" in capsys.readouterr().out
    # Without a judge MM-Vet has no score, and says so.
    assert command.run(parser.parse_args([*common, "--judge", "exact_matching"])) == 1
    assert "MMVet: no score: MMVet is rated by a judge" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row with stored answers for POPE"):
        command.run(parser.parse_args([*common, "--judge", "exact_matching", "--data", "POPE"]))


def test_answers_to_another_file_are_refused(results: Path, tmp_path: Path):
    from ivcp_eval.runs.records.rejudge import rejudge

    rows = [{**row, "benchmark_sha256": "0" * 64} for row in read_results(results)]
    write_results(results, rows)
    with pytest.raises(ValueError, match="is not the file to which the stored answers of MMVet belong"):
        rejudge(results, None, tmp_path / "cache")


def test_the_most_an_evaluation_can_cost(laboratory: Laboratory, tmp_path: Path):
    from ivcp_eval.runs.records.rejudge import estimate_eval

    for name in ("MMVet", "POPE", "TextVQA_VAL"):
        laboratory.dataset(name)
    assert benchmarks.load("TextVQA_VAL").judge == "none"
    cost = estimate_eval(["MMVet", "POPE", "TextVQA_VAL"], "", tmp_path, variants=3, max_new_tokens=100)
    assert (cost.calls, cost.tokens_out) == (15, 15 * 16)
    assert cost.tokens_in > 15 * 500
    assert estimate_eval(["MMVet", "POPE"], "gpt-4o", tmp_path, variants=2).calls == 2 * (5 + 6)
