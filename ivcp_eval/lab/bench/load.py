"""A closed loop: clients that each wait for an answer before they send their next request, and one server. No torch."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trace:
    """One request: when it was sent, and when the first and the last token of its answer came, in seconds."""

    sent: float
    first: float
    last: float

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from sending to the first token, waiting included."""
        return 1e3 * (self.first - self.sent)


def closed_loop(
    clients: int,
    each: int,
    most: int,
    answer: Callable[[Sequence[int]], Sequence[tuple[float, float]]],
    clock: Callable[[], float],
) -> list[Trace]:
    """Answer ``each`` requests of every client.

    All clients send their first request at the beginning, and each the next one at the very moment when the last token
    of its answer comes. Whenever the server is free, it takes those who wait as one batch, in the order in which they
    were sent; whoever sends while it works waits until the whole batch is answered.

    Args:
        most: requests in a batch.
        answer: answers a batch of request numbers, and says of each when its first and its last token came; request
            ``k`` is one of client ``k % clients``.
        clock: seconds, the same clock as that of ``answer``.

    Returns:
        Per request, by its number.
    """
    began = clock()
    waiting = [(began, number) for number in range(clients)]
    traces: dict[int, Trace] = {}
    while waiting:
        batch = [heapq.heappop(waiting) for _ in range(min(most, len(waiting)))]
        answered = answer([number for _, number in batch])
        for (sent, number), (first, last) in zip(batch, answered, strict=True):
            traces[number] = Trace(sent, first, last)
            if number + clients < clients * each:
                heapq.heappush(waiting, (last, number + clients))
    return [traces[number] for number in sorted(traces)]


def steady(traces: Sequence[Trace], clients: int) -> list[Trace]:
    """Without each client's first request, which all come at once; all of them where there are no others."""
    return list(traces[clients:] or traces)


def lengths(count: int, mean: int, spread: float) -> list[int]:
    """Tokens of ``count`` answers, evenly from (1 - spread) to (1 + spread) of the mean, in an order that is always the
    same; none is empty."""
    if count == 1:
        return [mean]
    ends = mean * (1 - spread), mean * (1 + spread)
    drawn = [max(1, round(ends[0] + (ends[1] - ends[0]) * i / (count - 1))) for i in range(count)]
    random.Random(0).shuffle(drawn)
    return drawn
