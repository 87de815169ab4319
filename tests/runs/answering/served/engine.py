"""A real HTTP server that answers with the embedded model through our engine, pruned or not, and fails as told."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from PIL import Image

from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.session import Session
from tests.vlmeval_bridge.judge.server import Reply, Server, serve

Trouble = Callable[[dict[str, Any], int], Reply | None]


def said(text: str | None, reason: str = "stop", prompt: int = 10, new: int = 2, **more: Any) -> Reply:
    """A chat completion with its usage."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return Reply(body=json.dumps({**body, **more}).encode())


def streamed(text: str, reason: str, new: int) -> Reply:
    """The same as a stream of server-sent events, one for each character."""
    common = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    events: list[dict[str, Any]] = [
        {**common, "choices": [{"index": 0, "delta": {"content": character}, "finish_reason": None}]}
        for character in text
    ]
    end = {"index": 0, "delta": {}, "finish_reason": reason}
    usage = {"prompt_tokens": 1, "completion_tokens": new, "total_tokens": 1 + new}
    events.append({**common, "choices": [end], "usage": usage})
    lines = [*(f"data: {json.dumps(event)}\n\n" for event in events), "data: [DONE]\n\n"]
    return Reply(body="".join(lines).encode(), headers={"Content-Type": "text/event-stream"})


def parts_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a request."""
    (turn,) = body["messages"]
    parts: list[dict[str, Any]] = []
    for part in turn["content"]:
        if part["type"] == "text":
            parts.append({"text": part["text"]})
        else:
            png = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
            parts.append({"image": Image.open(io.BytesIO(png))})
    return parts


def is_probe(body: dict[str, Any]) -> bool:
    """Whether it is the question that only finds out whether anybody answers."""
    return str(body["messages"][0]["content"][-1].get("text", "")).startswith("Reply with the word")


@contextmanager
def engine(session: Session, variant: Variant, trouble: Trouble = lambda body, n: None) -> Iterator[Server]:
    """Run a server that answers as ``variant`` does; ``trouble(body, n)`` may answer the n-th question instead."""
    lock, asked = threading.Lock(), 0

    def respond(body: dict[str, Any], _: int) -> Reply:
        nonlocal asked
        with lock:
            if is_probe(body):
                return said("ready")
            asked += 1
            if (instead := trouble(body, asked - 1)) is not None:
                return instead
            session.limits = replace(session.limits, max_new_tokens=body["max_tokens"])
            answer = session.answer(parts_of(body), variant)
        new = answer.new_tokens or 0
        reason = "length" if new >= body["max_tokens"] else "stop"
        if body.get("stream"):
            return streamed(answer.prediction, reason, new)
        return said(answer.prediction, reason, (answer.text_tokens or 0) + (answer.visual_kept or 0), new)

    with serve(respond) as server:
        server.models = ("tiny",)
        yield server
