"""Which numbers an option of a command, or a key of a sweep file, takes: one check for all of them. No torch."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

__all__ = ["AMOUNT", "COUNT", "INDEX", "POSITIVE", "SHARE", "Number"]


@dataclass(frozen=True)
class Number:
    """A kind of number; calling it on text is what argparse calls the ``type`` of an argument.

    Attributes:
        kind: int or float; always finite. low, high: smallest and largest; ``above``: low itself is not allowed;
            ``below``: high itself is not.
    """

    kind: type[int] | type[float] = int
    low: float = 0
    high: float = math.inf
    above: bool = True
    below: bool = False

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a finite number"
        low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        high = f" and {'below' if self.below else 'at most'} {self.high:g}"
        return f"{what} {low}" + ("" if self.high == math.inf else high)

    def fits(self, value: Any) -> bool:
        """Whether a value is of this kind; true and false are no numbers."""
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        high = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and high and (value > self.low if self.above else value >= self.low)

    def __call__(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if not self.fits(value):
            raise argparse.ArgumentTypeError(f"must be {self}, got {text!r}")
        return value


COUNT, INDEX = Number(), Number(above=False)
POSITIVE, AMOUNT = Number(float), Number(float, above=False)
SHARE = Number(float, high=1)
