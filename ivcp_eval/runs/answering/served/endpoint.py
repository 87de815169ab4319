"""One OpenAI-compatible server: what is sent to it, what of its replies counts, and which failure is whose."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.files import storable
from ivcp_eval.interface.failures import AnswerTimeout, InputRefused
from ivcp_eval.interface.variants import Server
from ivcp_eval.runs.answering.timing import Times
from ivcp_eval.vlmeval_bridge.judge.connection import (
    TRIES,
    WHOLE,
    NotACompletion,
    connected,
    key_of,
    redacted,
    refusal,
    unreadable,
)
from ivcp_eval.vlmeval_bridge.judge.masking import masked_logs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from openai import AsyncOpenAI

Parts = Sequence[Mapping[str, Any]]
RETRIES = 6  # of one request after 408, 409, 429, 5xx and lost connections
TIMEOUT_S = 600.0  # of one request where the run sets no limit: a server that hangs must end somewhere
_LENGTH = ("length", "max_tokens")  # reasons to stop, of servers that reached the limit that was sent, or their own
_PAUSE_S = 1.0


class ServerLost(RuntimeError):
    """Nothing can be asked of the server as things are; what it has answered is kept."""


class NoAnswer(RuntimeError):
    """The server is there, and fails on this sample."""


class CutShort(RuntimeError):
    """The answer ends before the length that was allowed: the server's own limit, or a lost end."""


class NoText(InputRefused):
    """An answer without text, each time it is asked for. It counts as wrong."""


@dataclass(frozen=True)
class Reply:
    """What a server said to one conversation.

    Attributes:
        text: without white space around it. prompt_tokens, new_tokens: of its ``usage``.
    """

    text: str
    prompt_tokens: int
    new_tokens: int


class Endpoint:
    """A server.

    Args:
        fields: of every request, beside model and messages. timeout: seconds of one request; None for `TIMEOUT_S`.
    """

    def __init__(self, server: Server, fields: Mapping[str, Any], timeout: float | None = None) -> None:
        self.server, self.fields, self.timeout = server, dict(fields), timeout or TIMEOUT_S
        self.model, self.title = server.model, ""
        self._longest = next((fields[name] for name in ("max_tokens", "max_completion_tokens") if fields.get(name)), 0)

    @asynccontextmanager
    async def open(self, streams: bool = False) -> AsyncIterator[AsyncOpenAI]:
        """A connection, of which the first one finds out what the server is, and asks it one tiny question.

        Args:
            streams: for `time`; else every reply is read whole, and bounded.

        Raises:
            ServerLost: it is not there, or does not take what is sent.
        """
        try:
            key = key_of(self.server.key)
        except ValueError as error:
            raise ServerLost(str(error)) from None
        self._secrets = (key,)
        async with connected(self.server.base_url, key, self.timeout, RETRIES, streams) as client:
            with masked_logs(self._secrets):
                if not self.title:
                    await self._introduce(client)
                yield client

    async def ask(self, client: AsyncOpenAI, parts: Parts) -> Reply:
        """The whole answer to one conversation.

        Raises:
            AnswerTimeout, NoAnswer, CutShort, NoText: of this sample. ServerLost: of every sample.
        """
        import openai

        messages, trouble = _messages(parts), ""
        for _ in range(TRIES):
            try:
                body = await client.chat.completions.create(
                    model=self.model,
                    messages=messages,  # type: ignore[arg-type]
                    extra_body=self.fields,
                )
                if (reply := self._read(body)).text:
                    return reply
                trouble = ""
            except openai.APITimeoutError:
                raise AnswerTimeout(
                    f"no answer of {self.server.host} within {self.timeout:g} s. Allow more time with --timeout"
                ) from None
            except (openai.APIStatusError, openai.APIConnectionError) as error:
                raise await self._whose(client, error) from None
            except unreadable() as error:
                trouble = redacted(error, self._secrets)
        if trouble:
            raise NoAnswer(f"{self.server.host} does not answer with chat completions ({trouble})")
        raise NoText(f"{self.server.host} gave an answer without text {TRIES} times")

    async def time(self, client: AsyncOpenAI, parts: Parts) -> Times:
        """Ask once more, the answer streamed, and take times; tokens are those of ``usage``, else parts of the stream.

        Raises:
            Exception: of any kind; the sample then has no time.
        """
        messages = _messages(parts)
        start, first, last, tokens = time.perf_counter(), 0.0, 0.0, 0
        async with asyncio.timeout(self.timeout):
            stream: Any = await client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                stream=True,
                extra_body=self.fields,
            )
            counted = None
            async for chunk in stream:
                if any(choice.delta.content for choice in chunk.choices):
                    last = time.perf_counter()
                    first, tokens = first or last, tokens + 1
                counted = chunk.usage.completion_tokens if chunk.usage else counted
        if not first:
            raise NoText(f"{self.server.host} streamed no text")
        end, tokens = time.perf_counter(), counted or tokens
        return Times(
            vision_ms=None,
            prefill_ms=None,
            decode_ms_per_token=round(1000 * (last - first) / (tokens - 1), 4) if tokens > 1 and last > first else None,
            end_to_end_ms=round(1000 * (end - start), 4),
            first_token_ms=round(1000 * (first - start), 4),
        )

    async def _introduce(self, client: AsyncOpenAI) -> None:
        listed, server = await self._listing(client)
        if not self.model:
            if len(listed) != 1:
                names = ", ".join(sorted(listed)[:5]) or "none"
                raise ServerLost(
                    f"which model of {self.server.host} is asked? It lists {names}; name one (model: in `served`, "
                    "--served-model)"
                )
            (self.model,) = listed
        from PIL import Image

        try:
            probe: Any = await client.chat.completions.create(
                model=self.model,
                messages=_messages(  # type: ignore[arg-type]
                    [{"image": Image.new("RGB", (224, 224), "grey")}, {"text": "Reply with the word: ready"}]
                ),
                extra_body=self.fields,
            )
            fingerprint = str(getattr(probe, "system_fingerprint", "") or "")
            self._read(probe)
        except CutShort:
            pass  # it answers, which is all that was asked
        except Exception as error:  # whatever it is, every sample would meet it
            raise ServerLost(
                f"{self.server.host} does not answer a question about a small grey picture, sent with "
                f"{json.dumps(self.fields)}: {redacted(error, self._secrets)}. A field that it does not take is left "
                "out or renamed by `options` of `served`, e.g. {max_tokens: null, max_completion_tokens: 64}"
            ) from None
        said = ", ".join(filter(None, (listed.get(self.model, ""), server, fingerprint)))
        self.title = storable(f"{self.model} at {self.server.host}" + (f" ({said})" if said else ""))

    async def _listing(self, client: AsyncOpenAI) -> tuple[dict[str, str], str]:
        """Model -> owner, of ``/models``, both empty where the server does not list them; and its ``Server`` header.

        Raises:
            ServerLost: nobody is there.
        """
        import httpx2
        import openai

        from ivcp_eval.vlmeval_bridge.judge.transport import BoundedClient, ReplyTooLong

        url, key = f"{self.server.base_url}/models", {"Authorization": f"Bearer {client.api_key}"}
        for attempt in range(TRIES):
            try:
                async with BoundedClient(min(30.0, self.timeout)) as http:
                    response = await http.get(url, headers=key)
                break
            except (httpx2.HTTPError, openai.APITimeoutError, ReplyTooLong) as error:
                if attempt == TRIES - 1:
                    raise ServerLost(
                        f"{self.server.host} cannot be reached ({redacted(error, self._secrets)}); start it, or "
                        "correct base_url"
                    ) from None
                await asyncio.sleep(_PAUSE_S)
        try:
            models = {str(model["id"]): str(model.get("owned_by", "")) for model in response.json()["data"]}
        except (ValueError, LookupError, TypeError, AttributeError):
            models = {}
        return models, response.headers.get("Server", "")

    async def _whose(self, client: AsyncOpenAI, error: Any) -> Exception:
        """The error to raise: of the sample where the server is there and takes requests, else of the server."""
        import openai

        text = redacted(error, self._secrets)
        if isinstance(error, openai.RateLimitError):
            return ServerLost(f"{self.server.host} has no capacity for us ({text}); lower concurrency, or wait")
        if isinstance(error, openai.APIStatusError) and error.status_code < 500:
            if error.status_code in (400, 408, 409, 413, 422):  # which other samples need not meet
                return NoAnswer(f"{self.server.host} refuses the request ({text})")
            return ServerLost(f"{self.server.host} {refusal(error, 'server')} ({text})")
        await self._listing(client)
        return NoAnswer(f"{self.server.host} fails ({text})")

    def _read(self, body: Any) -> Reply:
        """The answer of a reply.

        Raises:
            NotACompletion, CutShort, NoAnswer: as their classes say.
        """
        try:
            choice, usage = body.choices[0], body.usage
            content, reason = choice.message.content, str(choice.finish_reason or "").lower()
            prompt, new = usage.prompt_tokens, usage.completion_tokens
        except (AttributeError, IndexError, TypeError) as error:
            raise NotACompletion(f"no choices, or no usage, in the reply: {str(body)[:80]!r}") from error
        if not all(isinstance(n, int) and n >= 0 for n in (prompt, new)) or not isinstance(content, str | None):
            raise NotACompletion(f"no text, or no token counts, in the reply: {str(body)[:80]!r}")
        if reason not in WHOLE and not (reason in _LENGTH and new >= self._longest > 0):
            kind = NoAnswer if reason == "content_filter" else CutShort
            raise kind(f"the answer of {self.server.host} is not whole: {reason} after {new} tokens")
        return Reply(storable((content or "").strip()), prompt, new)


def _messages(parts: Parts) -> list[dict[str, Any]]:
    """One user turn. Pictures are sent as the model here would see them before it resizes them, without loss.

    Raises:
        OSError: one cannot be decoded. InputRefused: a video.
    """
    content: list[dict[str, Any]] = []
    for part in parts:
        if "image" in part:
            png = io.BytesIO()
            decoded(part["image"]).save(png, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        elif "video" in part:
            raise InputRefused("videos are not sent to servers, which would sample them in ways of their own")
        else:
            content.append({"type": "text", "text": part["text"]})
    return [{"role": "user", "content": content}]
