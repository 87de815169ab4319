"""The judge's HTTP client: an exchange has a deadline, a reply a greatest size, and a redirect stays on its host."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2  # openai's
import openai

MOST_BYTES = 4 << 20  # of a reply; the longest that a judge is allowed to think is a tenth of it
_MOST_REDIRECTS = 3


class ReplyTooLong(Exception):
    """More bytes than `MOST_BYTES`, or compressed ones, of which a few can become many."""


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """As the openai client's own, but reads every reply, an error's too, under limits.

    httpx's own time-outs are of one read, so a reply that drips never ends; and it reads a body whole before anybody
    can look at it. A redirect to another scheme, host or port is not followed and becomes the reply.

    Args:
        seconds: for one exchange: connecting, sending, headers, body, redirects.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(timeout=None, headers={"Accept-Encoding": "identity"})
        self._seconds = seconds

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """The reply, read to its end.

        Raises:
            ReplyTooLong: as it says. openai.APITimeoutError: no whole reply in time, which openai does not retry.
        """
        options |= {"stream": True, "follow_redirects": False}
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(_MOST_REDIRECTS):
                    response = await self._read(await super().send(request, **options))
                    following = response.next_request
                    if following is None or _origin(following) != _origin(request):
                        break
                    request = following
                return response
        except TimeoutError:
            raise openai.APITimeoutError(request) from TimeoutError(f"no whole reply within {self._seconds:g} s")

    async def _read(self, response: httpx2.Response) -> httpx2.Response:
        content = bytearray()
        try:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise ReplyTooLong(f"it is compressed ({encoding}), which was not asked for")
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > MOST_BYTES:
                    raise ReplyTooLong(f"it has more than {MOST_BYTES >> 20} MiB")
        finally:
            await response.aclose()
        whole = httpx2.Response(
            response.status_code, headers=response.headers, content=bytes(content), request=response.request
        )
        whole.next_request = response.next_request
        return whole


def _origin(request: httpx2.Request) -> tuple[str, str, int | None]:
    return request.url.scheme, request.url.host, request.url.port
