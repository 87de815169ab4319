"""The samples of one unit, asked of a server: several requests at once, each answer handed on as it comes."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from ivcp_eval.benchmarks.boxes import FORMATS
from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.failures import FAILURES
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.registry import adapter
from ivcp_eval.interface.variants import Server
from ivcp_eval.runs.answering.boxes import scored_box
from ivcp_eval.runs.answering.samples import Answered, Records, Sample, prompts_of
from ivcp_eval.runs.answering.served.endpoint import Endpoint, ServerLost
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import ModelPlan, Unit

if TYPE_CHECKING:
    from openai import AsyncOpenAI


Item = TypeVar("Item")
Result = TypeVar("Result")


class Served:
    """A server that answers for a model; it has no weights here, and perhaps a processor."""

    def __init__(self, model: ModelPlan, cell: Cell, timeout: float | None) -> None:
        server = cell.identity.variant.server
        assert server is not None
        self.server: Server = server
        self.weights, self.adapter = model.weights, adapter(model.weights.family)
        self.endpoint = Endpoint(server, cell.identity.generation, timeout)

    def check(self, grounding: bool) -> None:
        """Raises Unsupported where boxes cannot be read: pixels are those of a picture that only a processor knows."""
        if grounding and self._in_pixels and not any(self.weights.source.glob("*processor_config.json")):
            raise Unsupported(
                f"{self.weights.family} writes boxes in pixels of the resized picture, whose size the checkpoint's "
                f"processor says, and {self.weights.source} has none; give a folder with its JSON files (`path:`, "
                "--model-path)"
            )

    def answers(self, samples: Sequence[Sample], grounding: bool) -> Iterator[tuple[str, Answer]]:
        """(key, answer or failure) of each sample, in the order in which they come.

        Raises:
            ServerLost: the others cannot be asked.
        """

        async def answer(client: AsyncOpenAI, sample: Sample) -> tuple[str, Answer]:
            key, parts = sample
            try:
                reply = await self.endpoint.ask(client, parts)
                return key, Answer(
                    prediction=reply.text,
                    box=scored_box(reply.text, self.adapter, self._frame(parts)) if grounding else None,
                    device=self.endpoint.title,
                    prompt_tokens=reply.prompt_tokens,
                    new_tokens=reply.new_tokens,
                )
            except ServerLost:
                raise
            except FAILURES as error:
                return key, Answer.failed(error)

        yield from concurrently(self.endpoint, samples, answer)

    @property
    def _in_pixels(self) -> bool:
        return bool(self.adapter.box_format) and FORMATS[self.adapter.box_format].in_pixels

    def _frame(self, parts: Any) -> tuple[int, int] | None:
        if not self._in_pixels:
            return None
        picture = [{"image": decoded(part["image"])} if "image" in part else part for part in parts]
        return self.adapter.box_frame(self._processor, self.adapter.encode(self._processor, [picture]), 0)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(str(self.weights.source))


def served_samples(
    unit: Unit, served: Served, dataset: Any, cells: Sequence[Cell], known: Sequence[Records]
) -> Iterator[Answered]:
    """(key, its one answer) of every sample that the unit's cell lacks; ("", []) where a picture cannot be read.

    Args:
        cells: the one, or none where it cannot be answered. known: what is answered of it.

    Raises:
        ServerLost: the others cannot be asked.
    """
    for cell, before in zip(cells, known, strict=True):
        samples, broken = prompts_of(unit, served.adapter, dataset, cell)
        yield from [("", [])] * broken
        lacking = [sample for sample in samples if cell.needs_answer(before.get(sample[0]))]
        yield from ((key, [answer]) for key, answer in served.answers(lacking, unit.benchmark.kind == "grounding"))


def concurrently(
    endpoint: Endpoint,
    items: Sequence[Item],
    work: Callable[[AsyncOpenAI, Item], Coroutine[Any, Any, Result]],
    streams: bool = False,
) -> Iterator[Result]:
    """What ``work`` makes of each item, as many at once as the server is asked; closing it drops what is under way."""
    results: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> None:
        running.append((asyncio.get_running_loop(), asyncio.ensure_future(all_of_them())))
        await running[0][1]

    async def all_of_them() -> None:
        waiting = iter(items)

        async def worker() -> None:
            for item in waiting:
                results.put(await work(client, item))

        async with endpoint.open(streams) as client:
            await asyncio.gather(*[worker() for _ in range(endpoint.server.concurrency)])

    def run() -> None:
        try:
            asyncio.run(main())
        finally:
            results.put(None)

    if not items:
        return
    with ThreadPoolExecutor(1) as pool:  # the caller's thread may run an event loop of its own
        done = pool.submit(run)
        try:
            while (result := results.get()) is not None:
                yield result
            done.result()
        finally:
            for loop, task in running:
                with suppress(RuntimeError):  # it is over
                    loop.call_soon_threadsafe(task.cancel)
