"""The judge's client against a real server that answers, refuses, delays, lies and breaks off."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.vlmeval_bridge.judge import (
    Judge,
    JudgeConfig,
    JudgeError,
    JudgeRateLimited,
    JudgeRefused,
    JudgeUnreachable,
    JudgeUnusable,
    Question,
)
from tests.vlmeval_bridge.judge.server import Reply, Server, completion, error, serve

KEY = "sk-test-0123456789-do-not-print"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def question(number: int, prediction: str = "") -> Question:
    def parse(reply: str) -> str | None:
        return reply if reply in ("0.0", "0.5", "1.0") else None

    return Question("t/1", f"Rate {number}: {prediction}", f"q{number}", "truth", prediction or f"p{number}", parse)


def judge(server: Server, folder: Path, **changes: Any) -> Judge:
    return Judge(JudgeConfig("gpt-4o", server.url, **{"retries": 2, "timeout_s": 5, **changes}), folder)


def test_verdicts_in_order_from_a_pinned_model_at_temperature_zero(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        text = body["messages"][-1]["content"]
        return completion("ready" if "ready" in text else {"1": "0.5", "2": "1.0"}.get(text.split()[1][:-1], "0.0"))

    with serve(respond) as server:
        rater = judge(server, tmp_path)
        assert rater.rate([question(i) for i in (2, 0, 1)]) == ["1.0", "0.0", "0.5"]
        assert {request["model"] for request in server.requests} == {"gpt-4o-2024-08-06"}
        assert {request["temperature"] for request in server.requests} == {0.0}
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        assert len(server.prompts) == 3
        assert len(server.requests) == 4, "one probe, first"
        assert rater.sent == 4


def test_equal_questions_cost_once_and_other_runs_nothing(tmp_path: Path):
    with serve(lambda body, n: completion("1.0")) as server:
        first = judge(server, tmp_path)
        assert first.rate([question(0), question(1), question(0)]) == ["1.0"] * 3
        assert len(server.prompts) == 2
        second = judge(server, tmp_path)
        # The pruned model gave the baseline's answer to question 0 and another one to question 1.
        assert second.rate([question(0), question(1, "another")]) == ["1.0", "1.0"]
        assert len(server.prompts) == 3
    # Everything is known: no probe, no server, no key needed.
    assert judge(server, tmp_path).rate([question(0), question(1)]) == ["1.0", "1.0"]


def test_another_judge_template_or_reference_is_another_verdict():
    base = question(0)
    changed = [
        Question("t/2", base.prompt, base.question, base.reference, base.prediction, base.parse),
        Question("t/1", base.prompt + " ", base.question, base.reference, base.prediction, base.parse),
        Question("t/1", base.prompt, base.question + " ", base.reference, base.prediction, base.parse),
        Question("t/1", base.prompt, base.question, "other", base.prediction, base.parse),
        Question("t/1", base.prompt, base.question, base.reference, "other", base.parse),
        Question("t/1", base.prompt, base.question, base.reference, base.prediction, base.parse, "system"),
    ]
    keys = {base.key("a"), base.key("b"), *(one.key("a") for one in changed)}
    assert len(keys) == 8


def test_concurrency_is_used_and_bounded(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        reply = completion("1.0")
        reply.delay_s = 0.05
        return reply

    with serve(respond) as server:
        judge(server, tmp_path, concurrency=3).rate([question(i) for i in range(12)])
        assert server.most_at_once == 3


def test_a_rate_limit_is_waited_out_as_asked(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        return error(429, "slow down", Retry_After="1") if n == 1 else completion("1.0")

    with serve(respond) as server:
        assert judge(server, tmp_path).rate([question(0)]) == ["1.0"]
        assert 0.95 < server.times[2] - server.times[1] < 3


def test_server_errors_and_lost_replies_are_retried(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        if n == 1:
            return error(500, "oops")
        reply = completion("0.5")
        if n == 2:
            reply.cut = 20  # the connection ends in the middle of the JSON
        return reply

    with serve(respond) as server:
        assert judge(server, tmp_path).rate([question(0)]) == ["0.5"]
        assert len(server.prompts) == 3


@pytest.mark.parametrize(
    ("reply", "kind", "says"),
    [
        (error(401, f"Incorrect API key provided: {KEY}."), JudgeRefused, r"refuses the request.*\[key\]"),
        (error(404, "The model does not exist", "model_not_found"), JudgeRefused, "does not exist"),
        (error(400, "Unsupported parameter: max_tokens"), JudgeRefused, "max_tokens"),
        (error(429, "You exceeded your current quota", "insufficient_quota"), JudgeRateLimited, "quota"),
        (error(503, "overloaded"), JudgeUnreachable, "fails.*overloaded"),
        (Reply(body=b"<html>hello</html>", headers={"Content-Type": "text/html"}), JudgeUnreachable, "chat compl"),
        (Reply(body=b'{"choices": [{"mess'), JudgeUnreachable, "chat completions"),
        (Reply(body=b'{"choices": []}'), JudgeUnreachable, "chat completions"),
        (Reply(body=b'["1.0"]'), JudgeUnreachable, "chat completions"),
        (Reply(body=b""), JudgeUnreachable, "chat completions"),
        (Reply(body=b"1.0", delay_s=0.6), JudgeUnreachable, "cannot be reached"),
    ],
)
def test_a_judge_that_does_not_judge_is_an_error(tmp_path: Path, reply: Reply, kind: type[JudgeError], says: str):
    """Found by the probe, before any question is sent."""
    with serve(lambda body, n: reply) as server:
        rater = judge(server, tmp_path, retries=0, timeout_s=0.3 if reply.delay_s else 5)
        with pytest.raises(kind, match=says):
            rater.rate([question(0)])
        assert server.prompts == []
        assert not list(tmp_path.iterdir())


def test_nobody_there(tmp_path: Path):
    with serve(lambda body, n: completion("1.0")) as server:
        pass
    with pytest.raises(JudgeUnreachable, match=r"127\.0\.0\.1:\d+@gpt-4o-2024-08-06 cannot be reached"):
        judge(server, tmp_path, retries=0).rate([question(0)])


def test_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(JudgeRefused, match="set OPENAI_API_KEY"):
        Judge(JudgeConfig(), tmp_path).rate([question(0)])
    with serve(lambda body, n: completion("1.0")) as server:  # a server of one's own may need none
        assert judge(server, tmp_path).rate([question(0)]) == ["1.0"]


def test_what_was_rated_before_a_failure_is_kept(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        return completion("1.0") if n < 4 else error(500, "gone")

    with serve(respond) as server:
        rater = judge(server, tmp_path, concurrency=1, retries=0)
        with pytest.raises(JudgeUnreachable, match="kept; run again"):
            rater.rate([question(i) for i in range(9)])
        assert len(server.prompts) <= 5, "the rest is not sent to a judge that has failed"
    with serve(lambda body, n: completion("0.5")) as again:
        rater = Judge(JudgeConfig("gpt-4o", server.url), tmp_path)
        assert len(rater.unasked([question(i) for i in range(9)])) == 6
        assert len(again.requests) == 0


def test_an_unreadable_reply_is_asked_for_warmer_then_counted(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        text = body["messages"][-1]["content"]
        if text.startswith("Rate 0:"):
            return completion("I would say one half")
        return completion("well" if text.startswith("Rate 1:") and body["temperature"] == 0 else "1.0")

    questions = [question(i) for i in range(20)]
    with serve(respond) as server:
        assert judge(server, tmp_path).rate(questions) == [None] + ["1.0"] * 19
        temperatures = [r["temperature"] for r in server.requests if r["messages"][-1]["content"].startswith("Rate 0:")]
        assert temperatures == [0.0, 0.5, 1.0]
    # It is not filed as a verdict, so the next run asks again.
    assert list(Judge(JudgeConfig("gpt-4o", server.url), tmp_path).unasked(questions).values()) == questions[:1]


def test_filtered_replies_are_unrated_not_fatal(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        text = body["messages"][-1]["content"]
        if text.startswith("Rate 0:"):
            return error(400, "no", "content_filter")
        return completion(None, "content_filter") if text.startswith("Rate 1:") else completion("1.0")

    with serve(respond) as server:
        assert judge(server, tmp_path).rate([question(i) for i in range(30)]) == [None, None] + ["1.0"] * 28


def test_a_judge_that_makes_no_sense_is_unusable(tmp_path: Path):
    unusable = pytest.raises(JudgeUnusable, match=r"20 of 20 replies of judge .* cannot be read")
    with serve(lambda body, n: completion("as an AI model, ...")) as server, unusable:
        judge(server, tmp_path).rate([question(i) for i in range(20)])


def test_the_key_is_in_no_log_file_or_error(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd):
    """At the loudest setting of every logger, with a server that repeats the key."""

    def respond(body: dict[str, Any], n: int) -> Reply:
        return completion("1.0") if n < 3 else error(401, f"Incorrect API key provided: {KEY}")

    caplog.set_level(logging.DEBUG)
    names = [name for name in logging.root.manager.loggerDict if name.startswith(("openai", "http"))]
    for name in names:
        caplog.set_level(logging.DEBUG, logger=name)
    with serve(respond) as server:
        rater = judge(server, tmp_path, concurrency=1)
        try:
            rater.rate([question(i) for i in range(5)])
        except JudgeRefused:
            shown = "".join(traceback.format_exception(*sys.exc_info()))
    assert "refuses the request" in shown
    assert "Sending HTTP Request" in caplog.text, "the loggers were not loud, so the test proves nothing"
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "1.0" in written
    out = capfd.readouterr()
    for place in (shown, caplog.text, written, out.out, out.err, repr(rater), repr(vars(rater.config))):
        assert KEY not in place


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "exact_matching"}, "not the name of a judge"),
        ({"base_url": "ftp://me:secret@host"}, "must look like https://host/v1, got 'host'"),
        ({"concurrency": 0}, "concurrency >= 1"),
    ],
)
def test_bad_settings(changes: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says) as caught:
        JudgeConfig(**changes)
    assert "secret" not in str(caught.value)


def test_identity_names_place_model_and_extras(monkeypatch: pytest.MonkeyPatch):
    assert JudgeConfig().identity == "openai@gpt-4o-2024-08-06"
    assert JudgeConfig("gpt-4o-mini").identity == "openai@gpt-4o-mini-2024-07-18"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:secret@box:8000/v1/")
    assert JudgeConfig("qwen72b").identity == "box:8000@qwen72b"
    assert JudgeConfig("o9", extra={"temperature": None}).identity == "box:8000@o9;temperature=None"


def test_extra_fields_replace_ours(tmp_path: Path):
    with serve(lambda body, n: completion("1.0")) as server:
        extra = {"temperature": None, "max_tokens": None, "max_completion_tokens": 900}
        judge(server, tmp_path, extra=extra).rate([question(0)])
        assert {"temperature", "max_tokens"}.isdisjoint(server.requests[1])
        assert server.requests[1]["max_completion_tokens"] == 900


def test_records_can_be_audited(tmp_path: Path):
    with serve(lambda body, n: completion("0.5")) as server:
        judge(server, tmp_path).rate([question(3)])
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["question"] == "q3"
    assert record["prediction"] == "p3"
    assert record["verdict"] == record["reply"] == "0.5"
