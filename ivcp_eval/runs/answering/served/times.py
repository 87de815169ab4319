"""Time to first token and requests per second of servers, with as many requests under way as each is asked at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.interface.failures import FAILURES
from ivcp_eval.runs.answering.served.samples import Served, concurrently
from ivcp_eval.runs.answering.timing import Times, chosen, write_times
from ivcp_eval.runs.planning.cells import Cell

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_Sample = tuple[str, Any]
_ROUNDS = 4  # of as many requests as are under way at once, or their beginning and end would be most of the time


def time_served(engines: Sequence[Served], dataset: Any, cells: Sequence[Cell], n: int) -> int:
    """Stream answers to samples of one benchmark from all servers in turn, and write each cell's ``timing.json``.

    Half of the samples are asked of the servers in one order, half in the other. A sample that fails with one is left
    out for all. A server has answered these questions before and may have kept what it made of them, so each picture is
    changed by the lowest bits of a few pixels, which costs the same and is found in no cache.

    Args:
        engines: that of each cell. n: samples, at least; spread evenly, or all there are.

    Returns:
        How many samples were timed.
    """
    if not cells:
        return 0
    most = max(n, _ROUNDS * max(engine.server.concurrency for engine in engines))
    prompts = list(chosen(engines[0].adapter, dataset, most))
    timed: list[dict[str, Times]] = [{} for _ in cells]
    seconds = [0.0] * len(cells)
    order = list(range(len(cells)))
    for i in order:
        _stream(engines[i], prompts[:1])  # what is loaded or compiled for the first request is no part of the others
    for half in (prompts[::2], prompts[1::2]):
        for i in order:
            start = time.perf_counter()
            timed[i] |= _stream(engines[i], half)
            seconds[i] += time.perf_counter() - start
        order.reverse()
    whole = [index for index, _ in prompts if all(index in own for own in timed)]
    rates = [{"requests_per_s": round(len(own) / took, 4)} for own, took in zip(timed, seconds, strict=True)]
    samples = [[(index, own[index]) for index in whole] for own in timed]
    write_times(cells, samples, {"device": " + ".join(engine.server.host for engine in engines), "asked": n}, rates)
    return len(whole)


def _stream(engine: Served, prompts: Sequence[_Sample]) -> dict[str, Times]:
    """Index -> times, of the samples whose answer came."""

    async def ask(client: AsyncOpenAI, sample: _Sample) -> tuple[str, Times | None]:
        index, parts = sample
        try:
            return index, await engine.endpoint.time(client, _unseen(parts))
        except FAILURES:  # answering it said why
            return index, None

    made = concurrently(engine.endpoint, prompts, ask, streams=True)
    return {index: times for index, times in made if times is not None}


def _unseen(parts: Any) -> list[Any]:
    """The conversation, with random lowest bits in the first pixels of each picture."""
    return [{"image": _changed(decoded(part["image"]))} if "image" in part else part for part in parts]


def _changed(picture: Any) -> Any:
    import numpy as np
    from PIL import Image

    pixels = np.array(picture)
    first = pixels[0, :64]
    first ^= np.random.default_rng().integers(0, 2, first.shape, dtype=np.uint8)
    return Image.fromarray(pixels)
