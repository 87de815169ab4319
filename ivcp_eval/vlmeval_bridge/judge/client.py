"""Asking the judge: the openai client, several requests at once, and failures that stop the cell."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.vlmeval_bridge.judge.cache import VerdictCache
from ivcp_eval.vlmeval_bridge.judge.config import KEY_VARIABLE, OPENAI, JudgeConfig
from ivcp_eval.vlmeval_bridge.judge.questions import Question

if TYPE_CHECKING:
    from openai import OpenAI

# An unreadable reply is asked for again, a little warmer: at temperature 0 the same words would come back.
TEMPERATURES = (0.0, 0.5, 1.0)
# A judge that makes no sense this often is no judge (wrong model, broken template); below it, samples are left out.
MOST_UNREADABLE = 0.1
_BAD_BODIES = 3
_FILTERED = ("content_filter", "content_policy_violation")


class JudgeError(RuntimeError):
    """There are no verdicts, so there is no score. Verdicts that did arrive are in the cache; run again to go on."""


class JudgeUnreachable(JudgeError):
    """No connection, time-outs, server errors, or replies that are not chat completions, after all retries."""


class JudgeRefused(JudgeError):
    """The request is not accepted: no or a wrong key, no such model, a field it does not know."""


class JudgeRateLimited(JudgeError):
    """Too many requests, or no credit left, after all retries."""


class JudgeUnusable(JudgeError):
    """Too many of its replies cannot be read as verdicts."""


class Judge:
    """A judge and its cache.

    Attributes:
        config: which judge.
        cache: all its verdicts.
        sent: requests made, the probe included.
    """

    def __init__(self, config: JudgeConfig, folder: Path) -> None:
        self.config = config
        self.cache = VerdictCache(folder, config.identity)
        self.sent = 0
        self._client: OpenAI | None = None
        self._stop = threading.Event()
        self._count = threading.Lock()

    @property
    def identity(self) -> str:
        """See `JudgeConfig.identity`."""
        return self.config.identity

    def unasked(self, questions: Sequence[Question]) -> dict[str, Question]:
        """Key -> question, for those that the cache does not know; equal ones once."""
        self.cache.refresh()
        keyed = {question.key(self.identity): question for question in questions}
        return {key: question for key, question in keyed.items() if self.cache.get(key) is None}

    def rate(self, questions: Sequence[Question]) -> list[str | None]:
        """Verdicts in the order of the questions; None for a reply that cannot be read (or was filtered).

        Raises:
            JudgeError: one of its kinds; nothing that was already rated is lost.
        """
        missing = self.unasked(questions)
        if missing:
            self._probe()
            unreadable = self._ask_all(missing)
            if unreadable > max(1.0, MOST_UNREADABLE * len(missing)):
                raise JudgeUnusable(
                    f"{unreadable} of {len(missing)} replies of judge {self.identity} cannot be read as verdicts. "
                    "Name another model (JUDGE=); the readable verdicts are kept."
                )
        return [self.cache.get(question.key(self.identity)) for question in questions]

    def _probe(self) -> None:
        """One tiny request, so that a wrong key or address costs a second and not a run."""
        if self._client is None:
            self._client = self._connect()
            try:
                self._complete([{"role": "user", "content": "Reply with the word: ready"}], 16, 0.0)
            except JudgeError:
                self._client = None
                raise

    def _connect(self) -> OpenAI:
        from openai import OpenAI

        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not key and self.config.url == OPENAI:
            raise JudgeRefused(
                f"judge {self.identity} needs a key: set {KEY_VARIABLE} (or name another server with OPENAI_BASE_URL)"
            )
        return OpenAI(
            api_key=key or "none",
            base_url=self.config.url,
            timeout=self.config.timeout_s,
            max_retries=self.config.retries,
        )

    def _ask_all(self, questions: dict[str, Question]) -> int:
        """Ask, filling the cache as replies arrive; returns how many could not be read."""
        self._stop.clear()
        with ThreadPoolExecutor(max_workers=self.config.concurrency) as pool:
            futures = [pool.submit(self._ask, key, question) for key, question in questions.items()]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        return _unreadable(done)

    def _ask(self, key: str, question: Question) -> bool:
        """Whether a verdict could be had."""
        for temperature in TEMPERATURES:
            if self._stop.is_set():
                return False
            try:
                reply = self._complete(question.messages, question.max_tokens, temperature)
            except JudgeError:
                self._stop.set()  # here, so that no other thread sends one more
                raise
            verdict = question.parse(reply) if reply else None
            if verdict is not None:
                self.cache.add(
                    {
                        "key": key,
                        "verdict": verdict,
                        "reply": reply,
                        "judge": self.identity,
                        "template": question.template,
                        "temperature": temperature,
                        "question": question.question,
                        "reference": question.reference,
                        "prediction": question.prediction,
                    }
                )
                return True
        return False

    def _complete(self, messages: list[dict[str, str]], max_tokens: int, temperature: float) -> str | None:
        """The reply's text; None if it was filtered or is empty.

        Raises:
            JudgeError: as the class says; no message holds the key.
        """
        import openai

        assert self._client is not None
        fields = {"temperature": temperature, "max_tokens": max_tokens, **self.config.extra}
        fields = {name: value for name, value in fields.items() if value is not None}
        trouble = ""
        for _ in range(_BAD_BODIES):
            with self._count:
                self.sent += 1
            try:
                body: Any = self._client.chat.completions.create(
                    model=self.config.snapshot,
                    messages=messages,  # type: ignore[arg-type]
                    **fields,
                )
                return _text(body)
            except openai.RateLimitError as error:
                raise JudgeRateLimited(self._said("has no capacity or credit for us", error)) from None
            except openai.BadRequestError as error:
                if error.code in _FILTERED:
                    return None
                raise JudgeRefused(self._said("refuses the request", error)) from None
            except openai.InternalServerError as error:
                raise JudgeUnreachable(self._said("fails", error)) from None
            except openai.APIStatusError as error:
                raise JudgeRefused(self._said("refuses the request", error)) from None
            except openai.APIConnectionError as error:
                raise JudgeUnreachable(self._said("cannot be reached", error)) from None
            except (openai.APIResponseValidationError, json.JSONDecodeError, _NotACompletion) as error:
                trouble = self._said("does not answer with chat completions", error)
        raise JudgeUnreachable(trouble)

    def _said(self, what: str, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        key = os.environ.get(KEY_VARIABLE, "").strip()
        text = text.replace(key, "[key]") if key else text
        return f"judge {self.identity} {what} ({text[:300]}). Verdicts so far are kept; run again to retry."


class _NotACompletion(Exception):
    """A reply in another shape."""


def _text(body: Any) -> str | None:
    try:
        choice = body.choices[0]
        content = choice.message.content
    except (AttributeError, IndexError, TypeError) as error:
        raise _NotACompletion(f"no choices in the reply: {str(body)[:80]!r}") from error
    if choice.finish_reason == "content_filter" or not isinstance(content, str):
        return None
    return content.strip() or None


def _unreadable(done: set[Future[bool]]) -> int:
    errors = [error for future in done if not future.cancelled() and (error := future.exception())]
    if errors:
        raise errors[0]
    return sum(not future.result() for future in done)
