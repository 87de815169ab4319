"""Asking the judge: the openai client, several requests at once, and failures that stop the cell."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ivcp_eval.vlmeval_bridge.judge.cache import VerdictCache
from ivcp_eval.vlmeval_bridge.judge.config import KEY_VARIABLE, LENGTHS, OPENAI, JudgeConfig
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
from ivcp_eval.vlmeval_bridge.judge.masking import masked, masked_logs
from ivcp_eval.vlmeval_bridge.judge.questions import Question, without_thinking

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

# An unreadable reply is asked for again, a little warmer: at temperature 0 the same words would come back.
TEMPERATURES = (0.0, 0.5, 1.0)
# One that was cut off is asked for with more room: judges that think, or explain before they rate, need it.
MORE_ROOM, MOST_ROOM = 8, 4096
# A judge that makes no sense this often is no judge (wrong model, broken template); below it, samples are left out.
MOST_UNREADABLE = 0.1
_FILTERED = ("content_filter", "content_policy_violation")
_NO_ROOM = "output limit was reached"  # OpenAI's reasoning models refuse what they have no room to finish
# What to send in place of a field that the judge refuses; None leaves it out.
_INSTEAD: Mapping[str, str | None] = {**dict(zip(LENGTHS, reversed(LENGTHS), strict=True)), "temperature": None}

Outcome = Literal["rated", "unreadable", "cut"]


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
        self._probed = False
        self._renamed: dict[str, str | None] = {}  # as `_INSTEAD`, of what this judge has refused
        self._stop = threading.Event()
        self._stopped: set[str] = set()  # reasons of replies that were cut off

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
        """Verdicts in the order of the questions; None for a reply that is cut off, filtered or cannot be read.

        Raises:
            JudgeError: one of its kinds; nothing that was already rated is lost.
        """
        missing = self.unasked(questions)
        if missing:
            outcomes = self._ask_all(missing)
            unrated = len(missing) - outcomes["rated"]
            if unrated > max(1.0, MOST_UNREADABLE * len(missing)):
                reasons = ", ".join(sorted(self._stopped))
                cut = f"{outcomes['cut']} were cut off ({reasons}): allow more with --judge-options max_tokens=4096. "
                raise JudgeUnusable(
                    f"{unrated} of {len(missing)} replies of judge {self.identity} cannot be read as verdicts. "
                    f"{cut if outcomes['cut'] else ''}Name another model (JUDGE=); the readable verdicts are kept."
                )
        return [self.cache.get(question.key(self.identity)) for question in questions]

    def _ask_all(self, questions: Mapping[str, Question]) -> Counter[Outcome]:
        """Ask, filling the cache as replies arrive."""
        self._stop.clear()
        # In a thread, since the caller's may run an event loop of its own, as a notebook's does.
        with ThreadPoolExecutor(1) as pool:
            verdicts = pool.submit(lambda: asyncio.run(self._ask_each(questions)))
            try:
                return verdicts.result()
            finally:
                self._stop.set()

    async def _ask_each(self, questions: Mapping[str, Question]) -> Counter[Outcome]:
        waiting = iter(questions.items())
        outcomes: Counter[Outcome] = Counter()

        async def work() -> None:
            for key, question in waiting:
                if self._stop.is_set():
                    return
                try:
                    outcomes[await self._ask(client, key, question)] += 1
                except BaseException:
                    self._stop.set()  # here, so that no other worker sends one more
                    raise

        async with self._connect() as client:
            with masked_logs(self._secrets):
                await self._probe(client)
                workers = [work() for _ in range(self.config.concurrency)]
                results = await asyncio.gather(*workers, return_exceptions=True)
        for error in results:
            if error is not None:
                raise error
        return outcomes

    def _connect(self) -> AsyncOpenAI:
        key = self._key()
        if not key and self.config.url == OPENAI:
            raise JudgeRefused(
                f"judge {self.identity} needs a key: set {KEY_VARIABLE} (or name another server with OPENAI_BASE_URL)"
            )
        return connected(self.config.url, key, self.config.timeout_s, self.config.retries)

    def _key(self) -> str:
        try:
            return key_of(KEY_VARIABLE)
        except ValueError as error:
            raise JudgeRefused(str(error)) from None

    async def _probe(self, client: AsyncOpenAI) -> None:
        """One tiny request, so that a wrong key or address costs a second and not a run."""
        if not self._probed:
            with suppress(_CutOff):  # it answers, which is all that was asked
                await self._complete(client, [{"role": "user", "content": "Reply with the word: ready"}], 16, 0.0)
            self._probed = True

    async def _ask(self, client: AsyncOpenAI, key: str, question: Question) -> Outcome:
        warmer, room = iter(TEMPERATURES), question.max_tokens
        temperature = next(warmer)
        outcome: Outcome = "unreadable"
        for _ in TEMPERATURES:
            if self._stop.is_set():
                break
            try:
                reply = await self._complete(client, question.messages, room, temperature)
            except _CutOff as cut:
                self._stopped.add(str(cut))
                room, outcome = max(room, min(MORE_ROOM * room, MOST_ROOM)), "cut"
                continue
            except JudgeRefused:
                if outcome == "cut":  # so much room it has not
                    break
                raise
            said = without_thinking(reply)
            verdict = question.parse(said) if said else None
            if verdict is not None:
                self.cache.add(
                    {
                        "key": key,
                        "verdict": verdict,
                        "reply": masked(reply, self._secrets),
                        "judge": self.identity,
                        "template": question.template,
                        "sent": self._fields(room, temperature),
                        "question": question.question,
                        "reference": question.reference,
                        "prediction": question.prediction,
                    }
                )
                return "rated"
            temperature, outcome = next(warmer, temperature), "unreadable"
        return outcome

    def _fields(self, room: int, temperature: float) -> dict[str, Any]:
        """What is sent beside model and messages: the user's own fields instead of ours, and none that was refused."""
        own = self.config.extra
        ours = {"temperature": temperature} | ({} if own.keys() & set(LENGTHS) else {LENGTHS[0]: room})
        fields = {name: value for name, value in {**ours, **own}.items() if value is not None}
        for name, instead in self._renamed.items():
            if name in fields:
                value = fields.pop(name)
                fields |= {instead: value} if instead else {}
        return fields

    async def _complete(
        self, client: AsyncOpenAI, messages: list[dict[str, str]], room: int, temperature: float
    ) -> str:
        """The reply's text; empty if it was filtered.

        Raises:
            _CutOff: the reply is not whole. JudgeError: as the class says; no message holds the key.
        """
        import openai

        trouble, tries, before = "", min(TRIES, 1 + self.config.retries), dict(self._renamed)
        while tries:
            fields = self._fields(room, temperature)
            self.sent += 1
            try:
                body: Any = await client.chat.completions.create(
                    model=self.config.snapshot,
                    messages=messages,  # type: ignore[arg-type]
                    extra_body=fields,
                )
                return _text(body)
            except openai.RateLimitError as error:
                raise JudgeRateLimited(self._said("has no capacity or credit for us", error)) from None
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if error.code in _FILTERED:
                    return ""
                if _NO_ROOM in error.response.text:
                    raise _CutOff(_NO_ROOM) from None
                if not self._does_without(error, fields):
                    self._renamed = before
                    raise JudgeRefused(self._said("refuses the request", error)) from None
            except openai.InternalServerError as error:
                raise JudgeUnreachable(self._said("fails", error)) from None
            except openai.APIStatusError as error:
                raise JudgeRefused(self._said(refusal(error, "judge"), error)) from None
            except openai.APITimeoutError as error:
                trouble = self._said("cannot be reached", error)
                tries -= 1
            except openai.APIConnectionError as error:
                raise JudgeUnreachable(self._said("cannot be reached", error)) from None
            except unreadable() as error:
                trouble = self._said("does not answer with chat completions", error)
                tries -= 1
        raise JudgeUnreachable(trouble)

    def _does_without(self, error: APIStatusError, fields: Mapping[str, Any]) -> bool:
        """Whether the refusal names a field that need not be sent so; from now on it is not."""
        text = error.response.text
        for name in _INSTEAD:
            by_user = name == "temperature" and name in self.config.extra  # what the user asks for is not dropped
            old = name in self._renamed or name in self._renamed.values()
            if name in fields and not by_user and not old and re.search(rf"\b{name}\b", text):
                self._renamed[name] = _INSTEAD[name]
                return True
        return False

    @property
    def _secrets(self) -> tuple[str, ...]:
        url = urlsplit(self.config.url)
        return self._key(), url.password or url.username or ""

    def _said(self, what: str, error: Exception) -> str:
        text = redacted(error, self._secrets)
        return f"judge {self.identity} {what} ({text}). Verdicts so far are kept; run again to retry."


class _CutOff(Exception):
    """A reply that is not whole: "0" may be the beginning of "0.8"."""


def _text(body: Any) -> str:
    try:
        choice = body.choices[0]
        content = choice.message.content
    except (AttributeError, IndexError, TypeError) as error:
        raise NotACompletion(f"no choices in the reply: {str(body)[:80]!r}") from error
    reason = str(choice.finish_reason or "").lower()
    if reason == "content_filter" or not isinstance(content, str):
        return ""
    if reason not in WHOLE:
        raise _CutOff(reason)
    return content.strip()
