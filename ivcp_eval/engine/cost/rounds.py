"""Repeated measurements: rounds in which every candidate runs once, and how their results spread. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
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


def interleave(
    functions: Mapping[str, Callable[[], T]],
    rounds: int,
    warmup: int = 1,
    keep_going: Callable[[], bool] = lambda: True,
) -> dict[str, list[T]]:
    """Call every function once per round, so that drift meets all alike; each round starts with another one.

    Args:
        functions: name -> what to call. rounds: recorded rounds. warmup: rounds before them, thrown away.
        keep_going: asked before every round but the first; False ends the series.

    Returns:
        name -> results, one per round, rounds in the same order for every name.
    """
    names = list(functions)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        if number > 0 and not keep_going():
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            result = functions[name]()
            if number >= 0:
                results[name].append(result)
    return results
