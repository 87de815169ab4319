"""What a served engine may do wrong, and whose failure it is: the sample's, or that of all samples."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from ivcp_eval.interface.variants import Server
from ivcp_eval.runs.answering.served import endpoint as module
from ivcp_eval.runs.answering.served.endpoint import Endpoint, Reply
from ivcp_eval.runs.answering.served.samples import concurrently
from tests.runs.answering.served.engine import is_probe, parts_of, said, streamed
from tests.vlmeval_bridge.judge import server as http
from tests.vlmeval_bridge.judge.server import error, serve

AT_ONCE = {"retry_after_ms": "1"}
Respond = Callable[[dict[str, Any], int], http.Reply]


@contextmanager
def asked(respond: Respond, timeout: float | None = None, probe: http.Reply | None = None) -> Iterator[Any]:
    """A function that asks ``n`` questions, one after the other: replies, or names of exceptions."""
    count = iter(range(1000))
    with serve(lambda body, n: (probe or said("ready")) if is_probe(body) else respond(body, next(count))) as server:
        fields = {"temperature": 0, "max_tokens": 8}
        engine = Endpoint(Server(server.url, "tiny", concurrency=1), fields, timeout)

        async def ask(client: Any, text: str) -> Reply | str:
            try:
                return await engine.ask(client, [{"image": Image.new("RGB", (4, 3), "red")}, {"text": text}])
            except module.ServerLost:
                raise
            except Exception as failed:
                return f"{type(failed).__name__}: {failed}"

        yield lambda n=1: list(concurrently(engine, [str(i) for i in range(n)], ask)), server, engine


def test_pictures_are_sent_as_they_are_decoded_and_text_as_it_is() -> None:
    with asked(lambda body, n: said(" yes \n", prompt=7, new=3)) as (ask, server, engine):
        assert ask() == [Reply("yes", 7, 3)]
        picture, text = parts_of(server.requests[-1])
        assert (picture["image"].size, picture["image"].getpixel((0, 0)), text) == ((4, 3), (255, 0, 0), {"text": "0"})
        assert {key: server.requests[-1][key] for key in ("model", "temperature", "max_tokens")} == {
            **{"model": "tiny", "temperature": 0, "max_tokens": 8}
        }
        ask()
        assert sum(map(is_probe, server.requests)) == 1, "once for a server"
        assert engine.title.startswith("tiny at 127.0.0.1:")


def test_too_many_requests_wait_as_the_server_asks() -> None:
    with asked(lambda body, n: error(429, "slow down", Retry_After="1") if n == 0 else said("yes")) as (ask, server, _):
        assert ask() == [Reply("yes", 10, 2)]
        assert server.times[-1] - server.times[-2] >= 1
    with asked(lambda body, n: error(429, "never", **AT_ONCE)) as (ask, server, _):
        with pytest.raises(module.ServerLost, match=r"has no capacity for us .*never"):
            ask(3)
        assert len(server.requests) == 1 + 1 + module.RETRIES, "of one sample"


def test_errors_of_the_server_are_tried_again_then_the_samples() -> None:
    with asked(lambda body, n: error(500, "oops", **AT_ONCE) if n < 3 else said("yes")) as (ask, _, _):
        assert ask() == [Reply("yes", 10, 2)]
    crashes = module.RETRIES + 1
    with asked(lambda body, n: error(503, "oops", **AT_ONCE) if n < crashes else said("yes")) as (ask, _, _):
        failed, good = ask(2)
        assert failed.startswith("NoAnswer: 127.0.0.1")
        assert "oops" in failed
        assert good == Reply("yes", 10, 2), "the next sample is asked"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (said("maybe it is", "length", new=5), "CutShort: .*length after 5 tokens"),
        (said("maybe", "content_filter"), "NoAnswer: .*content_filter"),
        (said("maybe", "abort"), "CutShort: .*abort"),
        (said(""), "NoText: .*without text 3 times"),
        (said(None), "NoText"),
        (http.Reply(body=b"{not json"), "NoAnswer: .*does not answer with chat completions"),
        (http.Reply(body=b'{"choices": []}'), "NoAnswer: .*no choices, or no usage"),
        (http.completion("yes"), "NoAnswer: .*no usage"),
        (
            http.Reply(body=json.dumps({**json.loads(said("yes").body), "usage": {"prompt_tokens": "1"}}).encode()),
            "NoA",
        ),
        (error(400, "the picture is too large"), "NoAnswer: .*refuses the request .*too large"),
    ],
)
def test_what_is_no_whole_answer_is_a_failure(reply: http.Reply, says: str) -> None:
    import re

    with asked(lambda body, n: reply if parts_of(body)[1]["text"] == "0" else said("yes")) as (ask, _, _):
        failed, good = ask(2)
        assert re.match(says, failed, re.DOTALL), failed
        assert good == Reply("yes", 10, 2)


def test_an_answer_as_long_as_allowed_counts_as_it_does_here() -> None:
    with asked(lambda body, n: said("one two three", "length", new=8)) as (ask, _, _):
        assert ask() == [Reply("one two three", 10, 8)]


def test_a_slow_answer_is_late() -> None:
    slow = http.Reply(body=said("yes").body, delay_s=1.0)
    with asked(lambda body, n: slow if n == 0 else said("yes"), timeout=0.4) as (ask, server, _):
        late, good = ask(2)
        assert late.startswith("AnswerTimeout: no answer of 127.0.0.1")
        assert good == Reply("yes", 10, 2)
        assert len(server.requests) == 3, "not asked again"


@pytest.mark.parametrize(
    ("probe", "says"),
    [
        (error(401, "bad key sk-0123456789abcdef"), "bad key"),
        (error(404, "no such model"), "no such model"),
        (error(400, "max_tokens is unknown"), "max_tokens is unknown.*renamed by `options`"),
        (http.completion("ready"), "no usage"),
        (http.Reply(body=b"<html>"), "small grey picture"),
    ],
)
def test_what_every_sample_would_meet_ends_the_work_at_once(
    probe: http.Reply, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVED_API_KEY", "sk-0123456789abcdef")
    with asked(lambda body, n: said("yes"), probe=probe) as (ask, server, _):
        with pytest.raises(module.ServerLost, match=says) as caught:
            ask(3)
        assert "0123456789abcdef" not in str(caught.value)
        assert all(map(is_probe, server.requests))


def test_a_refused_key_in_between_ends_the_work() -> None:
    with asked(lambda body, n: error(401, "expired") if n else said("yes")) as (ask, server, _):
        with pytest.raises(module.ServerLost, match="expired"):
            ask(4)
        assert len(server.requests) == 3


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    with serve(lambda body, n: said("yes")) as gone:
        pass
    engine = Endpoint(Server(gone.url, "tiny"), {"max_tokens": 8})
    with pytest.raises(module.ServerLost, match="cannot be reached"):
        list(concurrently(engine, ["x"], lambda client, item: engine.ask(client, [{"text": item}])))


def test_a_server_that_goes_away_in_between_is_lost_and_not_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose failure a broken connection is, only the server can say: there or gone."""
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)

    async def ask_before_and_after() -> None:
        with ExitStack() as up:
            count = iter(range(1000))
            broken = error(503, "going down", **AT_ONCE)
            server = up.enter_context(
                serve(lambda body, n: said("yes") if is_probe(body) or next(count) == 0 else broken)
            )
            engine = Endpoint(Server(server.url, "tiny"), {"max_tokens": 8})
            async with engine.open() as client:
                assert await engine.ask(client, [{"text": "0"}]) == Reply("yes", 10, 2)
                up.close()
                with pytest.raises(module.ServerLost, match="cannot be reached"):
                    await engine.ask(client, [{"text": "1"}])

    asyncio.run(ask_before_and_after())


@pytest.mark.parametrize(("models", "says"), [(("a", "b"), "It lists a, b; name one"), (None, "It lists none")])
def test_the_model_is_named_or_the_only_one(models: tuple[str, ...] | None, says: str) -> None:
    with serve(lambda body, n: said("yes")) as server:

        def ask() -> list[Reply]:
            engine = Endpoint(Server(server.url), {"max_tokens": 8})
            return list(concurrently(engine, ["x"], lambda client, item: engine.ask(client, [{"text": item}])))

        server.models = models
        with pytest.raises(module.ServerLost, match=says):
            ask()
        server.models = ("only",)
        assert ask() == [Reply("yes", 10, 2)]
        assert {request["model"] for request in server.requests} == {"only"}


def test_requests_under_way_are_dropped_when_nobody_waits() -> None:
    with asked(lambda body, n: said("yes") if n == 0 else http.Reply(body=said("late").body, delay_s=5)) as (
        _,
        server,
        e,
    ):
        made = concurrently(e, ["0", "1", "2"], lambda client, item: e.ask(client, [{"text": item}]))
        assert next(made) == Reply("yes", 10, 2)
        made.close()  # type: ignore[attr-defined]
        assert len(server.requests) <= 3


def test_the_first_token_is_timed_when_it_comes() -> None:
    paced = replace(streamed("abcd", "stop", 5), pause_s=0.2)
    with asked(lambda body, n: paced) as (_, server, engine):
        (times,) = concurrently(engine, ["x"], lambda client, item: engine.time(client, [{"text": item}]), streams=True)
        assert server.requests[-1]["stream"] is True
    assert times.first_token_ms >= 200, times
    assert 500 <= 4 * times.decode_ms_per_token < 1000, "5 tokens by the server's usage"
    assert times.end_to_end_ms > times.first_token_ms + 600
    assert times.prefill_ms is times.vision_ms is None
