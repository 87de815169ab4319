"""Which judge, where, and how politely. The key is not here: it is read from the environment when it is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT = "gpt-4o"
EXACT_MATCHING = "exact_matching"
KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI = "https://api.openai.com/v1"
LENGTHS = ("max_tokens", "max_completion_tokens")  # the two names of the same limit; newer models want the second
_OURS = ("model", "messages", "stream", "n")

# A name that moves with time would make equal commands give unequal results, so it stands for one snapshot.
SNAPSHOTS: Mapping[str, str] = {
    "gpt-4o": "gpt-4o-2024-08-06",
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-4-turbo": "gpt-4-turbo-2024-04-09",
    "gpt-4.1": "gpt-4.1-2025-04-14",
}


@dataclass(frozen=True)
class JudgeConfig:
    """A judge behind an OpenAI-compatible chat endpoint.

    Attributes:
        model: what is sent as ``model``; a name in `SNAPSHOTS` stands for its snapshot.
        base_url: up to and including ``/v1``; empty takes ``$OPENAI_BASE_URL``, else OpenAI's.
        concurrency: requests under way at once.
        timeout_s: of one request, from connecting to the reply's last byte. retries: of one request after 408, 409,
            429, 5xx and lost connections, waiting as long as ``Retry-After`` asks, else exponentially longer; at most
            two after a time-out or a reply of another shape.
        extra: further fields of each request (they take part in the identity), such as ``max_completion_tokens``,
            ``temperature`` or ``reasoning_effort``; None removes a field.
    """

    model: str = DEFAULT
    base_url: str = ""
    concurrency: int = 8
    timeout_s: float = 120.0
    retries: int = 6
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model.strip() or self.model == EXACT_MATCHING:
            raise ValueError(f"{self.model!r} is not the name of a judge model, e.g. {DEFAULT}")
        if self.concurrency < 1 or self.retries < 0 or self.timeout_s <= 0:
            raise ValueError(
                "a judge needs concurrency >= 1, retries >= 0 and timeout_s > 0, "
                f"got {self.concurrency}, {self.retries} and {self.timeout_s}"
            )
        check_options(self.extra)
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise ValueError(f"the judge's base URL must look like https://host/v1, got {_without_user(self.url)!r}")

    @property
    def snapshot(self) -> str:
        """The model as it is sent."""
        return SNAPSHOTS.get(self.model, self.model)

    @property
    def length(self) -> int | None:
        """The length of a reply that `extra` asks for; None leaves it to the question."""
        return next((self.extra[name] for name in LENGTHS if self.extra.get(name)), None)

    @property
    def url(self) -> str:
        """The base URL in force."""
        return (self.base_url or os.environ.get(URL_VARIABLE) or OPENAI).rstrip("/")

    @property
    def identity(self) -> str:
        """``openai@gpt-4o-2024-08-06``, or ``host:port@model`` elsewhere: what results and verdicts are filed under."""
        parts = urlsplit(self.url)
        host = "openai" if self.url == OPENAI else f"{parts.hostname}{f':{parts.port}' if parts.port else ''}"
        extra = "".join(f";{name}={self.extra[name]!r}" for name in sorted(self.extra))
        return f"{host}@{self.snapshot}{extra}"


def check_options(extra: Mapping[str, Any]) -> None:
    """Raises ValueError, with what is allowed, if fields cannot be added to a request."""
    for name, value in extra.items():
        if not isinstance(name, str) or name in _OURS:
            raise ValueError(f"judge option {name!r} is not free to choose; e.g. max_tokens, temperature, top_p are")
        length = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if name in LENGTHS and value is not None and not length:
            raise ValueError(f"judge option {name} must be a whole number above 0, or None, got {value!r}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        if name == "temperature" and value is not None and not number:
            raise ValueError(f"judge option temperature must be a number of at least 0, or None, got {value!r}")


def _without_user(url: str) -> str:
    return url.rpartition("@")[2]


def judge_for(named: str, need: str) -> str:
    """The judge model for one benchmark; `EXACT_MATCHING` or "none" where no judge is asked.

    Args:
        named: what the user named; empty leaves it to the benchmark.
        need: the benchmark's: "none", "optional" or "required".
    """
    if need == "none":
        return "none"
    return named or (DEFAULT if need == "required" else EXACT_MATCHING)


def cache_folder(runs: Path) -> Path:
    """The verdicts shared by all runs below one results folder: ``results/runs`` -> ``results/cache/judge``."""
    return runs.parent / "cache" / "judge"
