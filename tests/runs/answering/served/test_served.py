"""Served engines as variants: answers and scores are those of the model behind them, and they pair as any other."""

from __future__ import annotations

from typing import Any

import pytest

from ivcp_eval.cli import main
from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.compare import compare
from ivcp_eval.runs.answering.session import Session
from tests.runs.answering.served.conftest import Bench
from tests.runs.answering.served.engine import engine

BASELINE, PRUNED = Variant("tiny"), Variant("tiny", "fastv", 0.5)
LOCAL = {"method": "fastv", "ratios": [0.5]}


def test_servers_answer_and_score_as_the_models_behind_them(bench: Bench, session: Session) -> None:
    with engine(session, BASELINE) as whole, engine(session, PRUNED) as pruned:
        assert bench.sweep("servers", whole.url, [bench.pruned(pruned.url)]) == 0
        assert whole.most_at_once == 2, "as many at once as the sweep says"
        assert {request["temperature"] for request in whole.requests} == {0}
    assert bench.sweep("local", "", [LOCAL]) == 0
    served, local = bench.rows("servers"), bench.rows("local")
    for benchmark in ("tiny_mcq", "tiny_grounding"):
        for there, here in (("none", "none"), ("deployed", "fastv")):
            one, other = served[there, benchmark], local[here, benchmark]
            assert one["status"] == "ok"
            assert (one["score"], one["n_samples"], one["n_failed"]) == (other["score"], other["n_samples"], 0)
            asked, given = bench.samples(one), bench.samples(other)
            for column in ("index", "prompt_sha256", "prediction", "score", "iou", "answer", "new_tokens"):
                assert [row[column] for row in asked] == [row[column] for row in given], column
            assert all(row["visual_kept"] is None and row["prompt_tokens"] > 0 for row in asked)
    assert served["deployed", "tiny_mcq"]["score"] is not None
    kept = [served[method, "tiny_mcq"]["prompt_tokens_mean"] for method in ("none", "deployed")]
    assert kept[1] < kept[0], "what the server says of its prompt"


def test_rows_say_who_answered_and_what_was_sent(bench: Bench, session: Session) -> None:
    with engine(session, BASELINE) as whole, engine(session, PRUNED) as pruned:
        options = {"repetition_penalty": 1.0}
        assert bench.sweep("servers", whole.url, [bench.pruned(pruned.url, options=options)], max_new_tokens=9) == 0
    row, baseline = bench.rows("servers")["deployed", "tiny_mcq"], bench.rows("servers")["none", "tiny_mcq"]
    assert row["served"] == (
        f'{{"base_url":"{pruned.url}","concurrency":2,"model":"tiny","options":{{"repetition_penalty":1.0}}}}'
    )
    assert row["generation"] == '{"max_tokens":9,"repetition_penalty":1.0,"temperature":0}'
    host = pruned.url.removeprefix("http://").removesuffix("/v1")
    assert row["device"].startswith(f"tiny at {host} (test, BaseHTTP")
    for unknown in ("revision", "dtype", "attention", "min_pixels", "trained_weights", "ratio_kept_final"):
        assert row[unknown] in ("", None), unknown
    assert baseline["run_id"] != row["run_id"]


def test_a_server_is_compared_with_the_unpruned_server_or_with_the_model_here(bench: Bench, session: Session) -> None:
    with engine(session, BASELINE) as whole, engine(session, PRUNED) as pruned:
        assert bench.sweep("servers", whole.url, [bench.pruned(pruned.url)]) == 0
        assert bench.sweep("mixed", "", [LOCAL, bench.pruned(pruned.url)]) == 0
    served = {row.benchmark: row for row in compare(bench.folder / "servers.csv").rows}
    mixed = {(row.method, row.benchmark): row for row in compare(bench.folder / "mixed.csv").rows}
    for benchmark in ("tiny_mcq", "tiny_grounding"):
        one, here, there = served[benchmark], mixed["fastv", benchmark], mixed["deployed", benchmark]
        assert one.paired
        assert one.difference == here.difference == there.difference
        assert (one.right_to_wrong, one.wrong_to_right) == (here.right_to_wrong, here.wrong_to_right)
        assert any("answered by a server" in note for note in there.notes)
        assert not any("answered by a server" in note for note in (*one.notes, *here.notes))


def test_eval_asks_servers_by_their_urls(
    bench: Bench, session: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVED_API_KEY", "not-to-be-seen-7f3a")
    with engine(session, BASELINE) as whole, engine(session, PRUNED) as pruned:
        command = [
            *("eval", "--base-url", pruned.url, "--baseline-url", whole.url, "--data", "tiny_mcq", "--limit", "3"),
            *("--no-timing", "--quiet", "--runs", str(bench.folder / "runs")),
        ]
        assert main(command) == 0
        assert {headers["authorization"] for headers in whole.headers} == {"Bearer not-to-be-seen-7f3a"}
    assert "deployed 0.5" in capsys.readouterr().out
    assert main(command) == 0, "what is finished is not asked again; nobody is there to ask"
    for path in bench.folder.rglob("*"):
        assert not path.is_file() or b"not-to-be-seen" not in path.read_bytes(), path
    capsys.readouterr()
    assert main([*command, "--limit", "2"]) != 0
    assert "cannot be reached" in capsys.readouterr().out


def test_every_cell_is_counted_and_one_server_for_two_variants_is_told(
    bench: Bench, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    with engine(session, BASELINE) as whole:
        command = [
            *("eval", "--base-url", whole.url, "--baseline-url", f"{whole.url}/", "--data", "tiny_mcq", "--limit", "3"),
            *("--no-timing", "--runs", str(bench.folder / "runs")),
        ]
        assert main(command) == 0
    said = capsys.readouterr()
    twice = f"none 1 and deployed 0.5 are asked of one server in the same way ({whole.url})"
    assert twice in said.err + said.out
    assert "6/6 samples" in said.err + said.out
    assert "2/2 cells scored" in said.err + said.out
    (row,) = compare(bench.folder / "eval" / "tiny.csv").rows
    assert any("one server answers both" in note for note in row.notes)


def test_weights_need_not_be_here(bench: Bench, session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    with engine(session, BASELINE) as whole, engine(session, PRUNED) as pruned:
        command = [
            *("eval", "--model", "qwen25", "--base-url", pruned.url, "--baseline-url", whole.url, "--limit", "2"),
            *("--no-timing", "--quiet", "--max-new-tokens", "4", "--runs", str(bench.folder / "runs")),
        ]
        assert main([*command, "--data", "tiny_mcq"]) == 0
        capsys.readouterr()
        assert main([*command, "--data", "tiny_grounding"]) != 0
    assert "boxes in pixels of the resized picture" in capsys.readouterr().err
    assert bench.rows("eval/qwen25")["deployed", "tiny_mcq"]["status"] == "ok"


def test_times_are_taken_of_streams_at_the_stated_concurrency(bench: Bench, session: Session) -> None:
    with engine(session, BASELINE) as whole, engine(session, PRUNED) as pruned:
        assert bench.sweep("servers", whole.url, [bench.pruned(pruned.url)], timing=2, benchmarks=["tiny_mcq"]) == 0
        timed, answered = [
            [
                request["messages"][0]["content"][0]["image_url"]["url"]
                for request in whole.requests
                if bool(request.get("stream")) == streams
            ]
            for streams in (True, False)
        ]
    assert len(timed) == len(set(timed)) == 1 + 5, "one untimed"
    assert not {*timed} & {*answered}, "no picture that a cache may have"
    for row in bench.rows("servers").values():
        assert row["first_token_ms_median"] > 0
        assert row["requests_per_s"] > 0
        assert row["prefill_ms_median"] is None
    compared = compare(bench.folder / "servers.csv").rows[0]
    assert compared.times["first_token"].n == compared.times["end_to_end"].n == 5
    assert compared.times["prefill"].n == 0


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ({"base_url": "localhost:8000"}, "must look like http://host:8000/v1"),
        ({"base_url": "http://me:secret-word@h/v1"}, "put the key into the environment variable"),
        ({"base_url": "http://h/v1?key=secret-word"}, "put the key into the environment variable"),
        ({"base_url": "http://h/v1", "key": "sk-secret-word"}, "the name of an environment variable"),
        ({"base_url": "http://h/v1", "concurrency": 0}, "concurrency must be a whole number above 0"),
        ({"base_url": "http://h/v1", "concurrency": "8"}, "concurrency of a server is '8'"),
        ({"base_url": "http://h/v1", "options": {"stream": True}}, "options stream are not free to choose"),
        ({"base_url": "http://h/v1", "url": "x"}, "unknown key 'url'"),
        ({"model": "x"}, "a server needs a base_url"),
    ],
)
def test_what_a_server_may_be(
    bench: Bench, capsys: pytest.CaptureFixture[str], served: dict[str, Any], said: str
) -> None:
    for methods, baseline in (([{"method": "deployed", "ratios": [0.5], "served": served}], ""), ([LOCAL], served)):
        model = {"served": baseline} if baseline else None
        assert bench.sweep("bad", "", methods, models={"tiny": model}) != 0
        error = capsys.readouterr().err
        assert said in error
        assert "line" in error
        assert "secret-word" not in error


def test_servers_and_methods_do_not_mix(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    server = bench.server("http://localhost:1/v1")
    for methods, model, said in (
        ([{"method": "deployed", "ratios": [0.5]}], "", "needs served: {base_url"),
        ([{**LOCAL, "served": server}], "", "runs here"),
        ([{**bench.pruned("http://localhost:1/v1"), "budget": "flops"}], "", "no budget"),
        ([LOCAL], server["base_url"], "weights that are here"),
    ):
        assert bench.sweep("mixed", model, methods) != 0
        assert said in capsys.readouterr().err
