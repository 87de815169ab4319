"""When requests of a closed loop are sent and answered, on a clock that only the server moves."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Sequence

import pytest
from transformers.generation.continuous_batching import ContinuousBatchingManager

from ivcp_eval.lab.bench.load import Trace, closed_loop, lengths, steady


class Server:
    """Takes ten seconds until the first tokens of a batch, and one for each further token."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self.wanted, self.now, self.batches = wanted, 100.0, list[list[int]]()

    def answer(self, numbers: Sequence[int]) -> list[tuple[float, float]]:
        self.batches.append(list(numbers))
        first = self.now + 10
        self.now = first + max(self.wanted[number] for number in numbers) - 1
        return [(first, first + self.wanted[number] - 1) for number in numbers]

    def clock(self) -> float:
        return self.now


def test_who_is_answered_asks_again_at_once_and_waits_for_the_batch() -> None:
    server = Server([1, 5, 2, 3])
    traces = closed_loop(2, 2, 8, server.answer, server.clock)
    assert server.batches == [[0, 1], [2, 3]]
    assert traces == [Trace(100, 110, 110), Trace(100, 110, 114), Trace(110, 124, 125), Trace(114, 124, 126)]
    assert [round(one.ttft_ms) for one in steady(traces, 2)] == [14_000, 10_000], "four seconds of waiting"
    assert steady(traces[:2], 2) == traces[:2], "nobody asked twice"


def test_a_batch_takes_those_who_wait_longest() -> None:
    server = Server([2, 4, 1, 1, 1, 1])
    traces = closed_loop(3, 2, 2, server.answer, server.clock)
    assert server.batches == [[0, 1], [2, 3], [4, 5]], "3 is sent before 4, while 0 and 1 are answered"
    assert [one.sent for one in traces] == [100, 100, 100, 111, 113, 123]


@pytest.mark.parametrize(("mean", "spread", "ends"), [(64, 0.5, (32, 96)), (8, 0.0, (8, 8)), (1, 1.0, (1, 2))])
def test_answers_are_of_the_mean_length(mean: int, spread: float, ends: tuple[int, int]) -> None:
    drawn = lengths(36, mean, spread)
    assert (min(drawn), max(drawn)) == ends
    assert statistics.mean(drawn) == pytest.approx(mean, abs=0.5)
    assert drawn == lengths(36, mean, spread)
    assert spread == 0 or drawn != sorted(drawn)


def test_stock_continuous_batching_takes_no_pictures() -> None:
    """What docs/bench.md says of it; where this fails, a release can be measured under its own scheduler."""
    taken = set(inspect.signature(ContinuousBatchingManager.add_request).parameters)
    assert "input_ids" in taken
    assert not {name for name in taken if "pixel" in name or "embeds" in name or "mm_" in name}
