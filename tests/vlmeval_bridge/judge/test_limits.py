"""What a judge's server may not do: cut off, drip, flood, send us elsewhere, repeat the key; and what it may ask."""

from __future__ import annotations

import gzip
import json
import logging
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.vlmeval_bridge.judge import Judge, JudgeConfig, JudgeRefused, JudgeUnreachable, JudgeUnusable, estimate
from ivcp_eval.vlmeval_bridge.judge.masking import masked
from tests.vlmeval_bridge.judge.server import Reply, completion, error, serve
from tests.vlmeval_bridge.judge.test_client import KEY, environment, judge, question

__all__ = ["environment"]
MIB = 1 << 20


# -- cut off --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "insufficient_system_resource", "cancelled"])
def test_a_reply_that_is_cut_off_is_no_verdict(tmp_path: Path, reason: str):
    """ "0.0" may be how "0.05" begins."""

    def respond(body: dict[str, Any], n: int) -> Reply:
        return completion("0.0", reason if "Rate 0:" in body["messages"][-1]["content"] else "stop")

    with serve(respond) as server:
        assert judge(server, tmp_path).rate([question(i) for i in range(20)]) == [None] + ["0.0"] * 19
        limits = [r["max_tokens"] for r in server.requests if r["messages"][-1]["content"].startswith("Rate 0:")]
    assert limits == [16, 128, 1024], "asked again, with more room"
    (path,) = tmp_path.iterdir()
    assert len(path.read_text().splitlines()) == 19


@pytest.mark.parametrize("reason", ["stop", "STOP", "eos_token", "end_turn", "COMPLETE", "", None])
def test_a_reply_that_is_whole_is_taken(tmp_path: Path, reason: str | None):
    with serve(lambda body, n: completion("0.5", reason)) as server:
        assert judge(server, tmp_path).rate([question(0)]) == ["0.5"]


def test_a_reason_that_nobody_knows_is_named(tmp_path: Path):
    with (
        serve(lambda body, n: completion("0.5", "moon phase")) as server,
        pytest.raises(JudgeUnusable, match=r"2 were cut off \(moon phase\)"),
    ):
        judge(server, tmp_path).rate([question(0), question(1)])


def test_bytes_that_are_no_text_are_no_completion(tmp_path: Path):
    body = b'{"choices":[{"message":{"content":"\xff"}}]}'
    with serve(lambda _, n: Reply(body=body)) as server, pytest.raises(JudgeUnreachable, match="UnicodeDecodeError"):
        judge(server, tmp_path, retries=0).rate([question(0)])


@pytest.mark.parametrize("location", ["http://[::bad", "/v1/chat/completions", ""])
def test_a_redirect_that_leads_nowhere_is_refused_in_words(tmp_path: Path, location: str):
    headers = {"Location": location} if location else {}
    with (
        serve(lambda _, n: Reply(307, headers=headers)) as server,
        pytest.raises(JudgeRefused, match="redirects, and not to where the judge is"),
    ):
        judge(server, tmp_path).rate([question(0)])


def test_with_more_room_it_is_whole(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        whole = body["max_tokens"] > 100
        return completion("<think>1.0?</think>\n0.5" if whole else "<think>1.0", "stop" if whole else "length")

    with serve(respond) as server:
        assert judge(server, tmp_path).rate([question(i) for i in range(4)]) == ["0.5"] * 4


def test_a_judge_that_takes_no_more_room_leaves_the_answer_out(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        if body.get("max_tokens") != 16:
            return error(400, "max_tokens is too large: 128")
        return completion("1.0", "length" if "Rate 0:" in body["messages"][-1]["content"] else "stop")

    with serve(respond) as server:
        rater = judge(server, tmp_path, concurrency=1)
        assert rater.rate([question(0), question(1)]) == [None, "1.0"]


def test_cut_off_replies_are_counted_and_the_remedy_named(tmp_path: Path):
    unusable = pytest.raises(
        JudgeUnusable, match=r"9 of 9 .* 9 were cut off \(length\): allow more with --judge-options max_tok"
    )
    with serve(lambda body, n: completion("0.0", "length")) as server, unusable:
        judge(server, tmp_path).rate([question(i) for i in range(9)])


# -- readable -------------------------------------------------------------------------------------------------------


def test_thinking_is_no_verdict(tmp_path: Path):
    texts = ["<think>0.0</think>1.0", "a tag is missing: 0.0\n</think>\n\n0.5", "<think>0.0"]

    def respond(body: dict[str, Any], n: int) -> Reply:
        text = body["messages"][-1]["content"]
        return completion(texts[int(text.split()[1][:-1])] if text.startswith("Rate") else "ready")

    with serve(respond) as server:
        assert judge(server, tmp_path).rate([question(i) for i in range(3)]) == ["1.0", "0.5", None]


# -- time, size, place ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False])
def test_a_drip_ends_at_the_deadline(tmp_path: Path, head: bool):
    """Every single read is quick; the whole would take minutes."""
    drip = Reply(drip_s=0.05, drip_head=head)
    with serve(lambda body, n: drip) as server:
        began = time.monotonic()
        with pytest.raises(JudgeUnreachable, match=r"cannot be reached.*no whole reply within 0\.3 s"):
            judge(server, tmp_path, retries=6, timeout_s=0.3).rate([question(0)])
        assert time.monotonic() - began < 2
        assert len(server.requests) == 3


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_flood_is_not_read(tmp_path: Path, status: int):
    flood = Reply(status, b" " * MIB, repeat=300)
    with serve(lambda body, n: flood) as server:
        with pytest.raises(JudgeUnreachable, match=r"chat completions.*more than 4 MiB"):
            judge(server, tmp_path, retries=0).rate([question(0)])
        assert server.sent <= 20 * MIB, "what the sockets hold included"


def test_a_bomb_is_not_unpacked(tmp_path: Path):
    bomb = Reply(body=gzip.compress(b" " * 50 * MIB), headers={"Content-Encoding": "gzip"})
    with serve(lambda body, n: bomb) as server:
        with pytest.raises(JudgeUnreachable, match="compressed"):
            judge(server, tmp_path, retries=0).rate([question(0)])
        assert server.headers[0]["accept-encoding"] == "identity"


def test_a_tower_of_brackets_is_no_completion(tmp_path: Path):
    tower = Reply(body=b"[" * MIB)
    with serve(lambda body, n: tower) as server, pytest.raises(JudgeUnreachable, match="chat completions"):
        judge(server, tmp_path, retries=0).rate([question(0)])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_another_host_gets_nothing(tmp_path: Path, status: int):
    with serve(lambda body, n: completion("1.0")) as other:
        away = Reply(status, headers={"Location": f"{other.url}/chat/completions"})
        with serve(lambda body, n: away) as server:
            host = other.url.split("/")[2]
            with pytest.raises(JudgeRefused, match=rf"redirects to {host}, where the key is not sent"):
                judge(server, tmp_path).rate([question(0)])
            assert len(server.requests) == 1
        assert other.requests == []


def test_the_same_host_may_redirect(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        return completion("1.0") if n % 2 else Reply(307, headers={"Location": "/v2/chat/completions"})

    with serve(respond) as server:
        assert judge(server, tmp_path, concurrency=1).rate([question(0)]) == ["1.0"]


# -- keys -----------------------------------------------------------------------------------------------------------

PARTS = [
    KEY,
    KEY[:8],
    f"{KEY[:7]}********{KEY[-4:]}",
    f"{KEY[:5]}...{KEY[-2:]}",
    f"'...{KEY[-4:]}'",
    KEY[6:20],
    KEY[:-1],
    "sk-other-account-0123",
]


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_the_key_are_masked_everywhere(
    tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
):
    """A server that quotes it in an error, in a header, and in the reply that becomes a record."""

    def respond(body: dict[str, Any], n: int) -> Reply:
        if n > 2:
            return error(401, f"Incorrect API key provided: {part}. You can find it at", x_key=part.strip("'"))
        return completion(f"<think>{part}</think>1.0")

    caplog.set_level(logging.DEBUG)
    with serve(respond) as server:
        url = server.url.replace("//", "//user-of-it:password-of-it@")
        rater = Judge(JudgeConfig("gpt-4o", url, concurrency=1), tmp_path)
        with pytest.raises(JudgeRefused, match=r"API key provided: .*\[key\]") as caught:
            rater.rate([question(i) for i in range(4)])
    assert "HTTP Request" in caplog.text, "the loggers were not loud, so the test proves nothing"
    logged = "".join(f"{record.getMessage()}{record.exc_text}" for record in caplog.records)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    shown = "".join(traceback.format_exception(caught.type, caught.value, caught.tb))
    for place in (shown, logged, caplog.text, written, *capfd.readouterr()):
        assert part.strip("'.") not in place
        assert "password-of-it" not in place
    assert "[key]" in written


def test_a_key_that_no_header_takes_is_refused_without_showing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    for wrong in (f"{KEY}\nand more", f"{KEY}é", f"{KEY} {KEY}"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with serve(lambda body, n: completion("1.0")) as server:
            with pytest.raises(JudgeRefused, match="OPENAI_API_KEY holds a character that no key has") as caught:
                judge(server, tmp_path).rate([question(0)])
            assert server.requests == []
        assert KEY[:8] not in str(caught.value) + caplog.text


def test_words_are_not_keys():
    text = (
        "The model `gpt-4o` does not exist... 0.85 of 1, risk-free; see https://platform.openai.com/account/api-keys."
    )
    assert masked(text, (KEY, "", "none", "plat")) == text
    assert masked("none, or plat", ("plat",)) == "none, or [key]"


# -- newer judges ---------------------------------------------------------------------------------------------------


def newer(body: dict[str, Any], n: int) -> Reply:
    """As OpenAI's reasoning models refuse, one field at a time."""
    if "max_tokens" in body:
        text = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return error(400, text, "unsupported_parameter")
    if body.get("temperature") not in (None, 1):
        text = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
        return error(400, text, "unsupported_value")
    if body["max_completion_tokens"] < 100:
        return error(400, "Could not finish the message because max_tokens or model output limit was reached.")
    return completion("0.5")


def test_a_newer_judge_is_asked_as_it_wants(tmp_path: Path):
    with serve(newer) as server:
        rater = judge(server, tmp_path, concurrency=1)
        assert rater.rate([question(0)]) == ["0.5"]
        fields = [{k: v for k, v in r.items() if k not in ("model", "messages")} for r in server.requests]
        assert fields == [
            {"max_tokens": 16, "temperature": 0.0},
            {"max_completion_tokens": 16, "temperature": 0.0},
            {"max_completion_tokens": 16},
            {"max_completion_tokens": 16},
            {"max_completion_tokens": 128},
        ]
        assert rater.rate([question(1), question(2)]) == ["0.5", "0.5"]
        assert not [r for r in server.requests[5:] if "max_tokens" in r or "temperature" in r], "it is remembered"
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text().splitlines()[0])["sent"] == {"max_completion_tokens": 128}
    assert rater.identity.endswith("@gpt-4o-2024-08-06"), "what it cannot be asked otherwise is no other judge"


def test_an_older_server_is_asked_as_it_wants(tmp_path: Path):
    def respond(body: dict[str, Any], n: int) -> Reply:
        if "max_completion_tokens" in body:
            detail = [{"loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted"}]
            return Reply(422, json.dumps({"detail": detail}).encode())
        return completion("0.5") if body["max_tokens"] == 900 else error(400, "where is my limit?")

    with serve(respond) as server:
        rater = judge(server, tmp_path, extra={"max_completion_tokens": 900})
        assert rater.rate([question(0)]) == ["0.5"]
    refused = pytest.raises(JudgeRefused, match="no such field: seed")
    with serve(lambda body, n: Reply(422, b'{"detail": "no such field: seed"}')) as server, refused:
        judge(server, tmp_path, extra={"seed": 1}).rate([question(0)])


def test_a_field_that_is_refused_under_both_names_ends_it(tmp_path: Path):
    with serve(lambda body, n: error(400, "max_tokens and max_completion_tokens: no")) as server:
        with pytest.raises(JudgeRefused, match="max_completion_tokens: no"):
            judge(server, tmp_path).rate([question(0)])
        assert len(server.requests) == 2


def test_what_the_user_asks_for_is_not_dropped(tmp_path: Path):
    with serve(newer) as server, pytest.raises(JudgeRefused, match="temperature"):
        judge(server, tmp_path, extra={"temperature": 0.3}).rate([question(0)])


def test_any_field_can_be_sent(tmp_path: Path):
    extra = {"max_completion_tokens": 2000, "temperature": None, "reasoning_effort": "low", "top_k": 1}
    with serve(newer) as server:
        rater = judge(server, tmp_path, extra=extra)
        assert rater.rate([question(0)]) == ["0.5"]
        sent = {k: v for k, v in server.requests[-1].items() if k not in ("model", "messages")}
    assert sent == {"max_completion_tokens": 2000, "reasoning_effort": "low", "top_k": 1}
    assert "max_completion_tokens=2000;reasoning_effort='low'" in rater.identity
    assert estimate([question(0)], 0, "m", length=rater.config.length).tokens_out == 2000


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"model": "x"}, "'model' is not free to choose"),
        ({"stream": True}, "'stream' is not free to choose"),
        ({"max_tokens": "many"}, "max_tokens must be a whole number above 0, or None, got 'many'"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must be a whole number above 0"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, or None, got nan"),
    ],
)
def test_options_that_cannot_be(extra: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        JudgeConfig(extra=extra)


def test_a_notebook_with_an_event_loop_of_its_own_can_ask(tmp_path: Path):
    import asyncio

    async def cell() -> list[str | None]:
        return judge(server, tmp_path).rate([question(0)])

    with serve(lambda body, n: completion("1.0")) as server:
        assert asyncio.run(cell()) == ["1.0"]
