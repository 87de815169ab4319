"""Bars that are drawn again and again over themselves belong on a terminal, not into files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO, cast


@contextmanager
def bars_on_terminals_only(quiet: bool = False) -> Iterator[None]:
    """Hold back the progress bars of every library where standard error is no terminal, or if ``quiet``.

    tqdm, which all of them use, has no switch of its own for that; what else is written passes through.
    """
    if sys.stderr.isatty() and not quiet:
        yield
        return
    with redirect_stderr(cast(TextIO, WithoutBars(sys.stderr))):
        yield


class WithoutBars:
    """A text stream that passes on what is written to it, except lines that begin with a carriage return."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_bar = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """False, by which some libraries leave their bars out by themselves."""
        return False

    def write(self, text: str) -> int:
        """As of every text stream."""
        # After a bar, line ends and "cursor up" are part of it.
        self._in_bar = text.startswith("\r") or (self._in_bar and not text.replace("\x1b[A", "").strip("\n"))
        if not self._in_bar:
            self._stream.write(text)
        return len(text)
