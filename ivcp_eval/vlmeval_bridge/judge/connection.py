"""How an OpenAI-compatible server is asked, and what is told of its errors: the judge's, and a served engine's."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ivcp_eval.vlmeval_bridge.judge.masking import masked

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

#: How servers say that a reply is whole; by any other reason to stop, known or not, it may be a part of one.
WHOLE = ("", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed", "finished", "end")
TRIES = 3  # after bodies that are no completions; others are retried as often as the user allows


class NotACompletion(Exception):
    """A reply in another shape."""


def unreadable() -> tuple[type[Exception], ...]:
    """What the client raises for a reply that is no chat completion, whatever else it may be."""
    import openai

    from ivcp_eval.vlmeval_bridge.judge.transport import ReplyTooLong

    decoding = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)
    return (openai.APIResponseValidationError, *decoding, ReplyTooLong, NotACompletion)


def key_of(variable: str) -> str:
    """The key that an environment variable holds; empty if there is none.

    Raises:
        ValueError: it holds what no header can.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{variable} holds a character that no key has (a space, a line break?); set it anew")
    return key


def connected(url: str, key: str, timeout_s: float, retries: int, streams: bool = False) -> AsyncOpenAI:
    """A client whose every exchange ends within ``timeout_s``, retried as `JudgeConfig.retries` says.

    Args:
        streams: hand on a reply while it arrives; who reads it has to limit it.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    from ivcp_eval.vlmeval_bridge.judge.transport import BoundedClient

    return AsyncOpenAI(
        api_key=key or "none",
        base_url=url,
        timeout=None,  # the client's own holds for all of an exchange
        max_retries=retries,
        http_client=DefaultAsyncHttpxClient(timeout=timeout_s, follow_redirects=False)
        if streams
        else BoundedClient(timeout_s),
    )


def redacted(error: Exception, secrets: Collection[str]) -> str:
    """An error with what the server said, without secrets; at most 300 characters."""
    text = f"{type(error).__name__}: {error}"
    response = getattr(error, "response", None)
    if response is not None and " - " not in text:  # openai shows its own kind of message only
        text += f" - {response.text}"
    return masked(f"{text} ({error.__cause__})" if error.__cause__ else text, secrets)[:300]


def refusal(error: APIStatusError, whose: str) -> str:
    """What a server does with a request that it does not take; ``whose`` server it is, in a word."""
    if 300 <= error.status_code < 400:
        with suppress(ValueError):  # a location that is no URL
            if host := urlsplit(error.response.headers.get("Location", "")).netloc.rpartition("@")[2]:
                return f"redirects to {host}, where the key is not sent; if that is the {whose}, name its URL"
        return f"redirects, and not to where the {whose} is; name its URL"
    return "refuses the request"
