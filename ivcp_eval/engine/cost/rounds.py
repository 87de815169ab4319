"""Repeated measurements: rounds in which every candidate runs once, and how their results spread. No torch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and number of repeated measurements."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; quartiles are interpolated and inclusive of the extremes."""
        if len(values) < 2:
            (only,) = values
            return cls(only, only, only, 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))

    @classmethod
    def of_ratios(cls, values: Sequence[float], references: Sequence[float]) -> Spread:
        """Of value over reference, round by round: drift that both share cancels."""
        return cls.of([value / reference for value, reference in zip(values, references, strict=True)])


#: A first call that took longer than so many seconds counts: what only a first call costs is a small part of it.
LONG_S = 30.0


def interleave(
    functions: Mapping[str, Callable[[], T]],
    rounds: int,
    warmup: int = 1,
    seconds: float = math.inf,
    kept: MutableMapping[tuple[str, int], tuple[float, T]] | None = None,
) -> dict[str, list[T]]:
    """Call every function once per round, so that drift meets all alike; each round starts with another one.

    Args:
        functions: name -> what to call. rounds: recorded rounds. warmup: calls of each before its first recorded one,
            thrown away.
        seconds: no round but the first is begun once all calls together took so long.
        kept: (name, round) -> (seconds, result) of every recorded call, added as it ends. What an earlier series that
            was cut left there is not called again, and its seconds count.

    Returns:
        name -> results, one per round, rounds in the same order for every name.
    """
    kept = {} if kept is None else kept
    names, cold, thrown_away, done = list(functions), set(functions), 0.0, 0

    def timed(name: str) -> tuple[float, T]:
        began = time.monotonic()
        result = functions[name]()
        return time.monotonic() - began, result

    for number in range(rounds):
        begun = any((name, number) in kept for name in names)
        spent = thrown_away + sum(kept[call][0] for call in kept if call[0] in functions)
        if number > 0 and spent >= seconds and not begun:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if (name, number) in kept:
                continue
            call: tuple[float, T] | None = None
            for _ in range(warmup if name in cold else 0):
                call = timed(name)
                if call[0] > LONG_S:
                    break
                thrown_away, call = thrown_away + call[0], None
            cold.discard(name)
            kept[name, number] = call or timed(name)
        done = number + 1
    return {name: [kept[name, number][1] for number in range(done)] for name in names}
