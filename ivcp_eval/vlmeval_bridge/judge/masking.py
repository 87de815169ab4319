"""Keys and passwords, whole or in part, do not appear in anything that is shown, logged or filed."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_MASK = "[key]"
_LIBRARIES = ("openai", "httpx", "httpcore")
_WORD = re.compile(r"[^\s\"'`<>(){}\[\],;:=@/\\]+")
_HIDDEN = re.compile(r"[*•…]+|\.{2,}|[xX]{4,}")  # how servers write the middle of a key that they quote
_OPENAI = re.compile(r"\bsk-[\w*•….-]{4,}")  # also another account's
_SHORTEST = 8  # below it, parts of a secret are parts of words


def masked(text: str, secrets: Collection[str]) -> str:
    """The text without the secrets and without parts of them: their beginnings, ends, and eight characters in a row."""
    for secret in filter(None, secrets):
        edge = r"\b" if len(secret) < _SHORTEST else ""
        text = re.sub(f"{edge}{re.escape(secret)}{edge}", _MASK, text)
    long = [secret for secret in secrets if len(secret) >= _SHORTEST]
    text = _WORD.sub(lambda word: _MASK if any(_has_part(word[0], secret) for secret in long) else word[0], text)
    return _OPENAI.sub(_MASK, text)


def _has_part(word: str, secret: str) -> bool:
    shown = _HIDDEN.split(word)
    for part in (part.rstrip(".!?") for part in shown):
        at_an_end = secret.startswith(part) or secret.endswith(part)
        if at_an_end and len(part) >= (2 if len(shown) > 1 else 4):
            return True
        if any(part[i : i + _SHORTEST] in secret for i in range(len(part) - _SHORTEST + 1)):
            return True
    return False


@contextmanager
def masked_logs(secrets: Collection[str]) -> Iterator[None]:
    """While it lasts, what the HTTP libraries log is masked: they write URLs with passwords, and a server's headers."""

    def mask(record: logging.LogRecord) -> bool:
        record.msg, record.args = masked(record.getMessage(), secrets), ()
        if record.exc_info:
            record.exc_text = masked(logging.Formatter().formatException(record.exc_info), secrets)
        return True

    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(_LIBRARIES)]
    for logger in loggers:
        logger.addFilter(mask)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(mask)
