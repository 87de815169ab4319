"""Times, measured apart from answering: some samples under the baseline and every variant in turn, in one process.

Answers are made in batches and in one pass for all variants, so none of them has a time of its own. After a benchmark
is answered, a few of its samples therefore run again, each variant alone. A sample runs under all variants before the
next one does, every second time in the opposite order, so that drift of the machine (clocks, other users) cancels in
the ratio of a variant to the baseline.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ivcp_eval.files import DamagedError, damage_as_clear_error, read_json, write_json
from ivcp_eval.interface.failures import FAILURES
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.runs.planning.cells import Cell

if TYPE_CHECKING:
    from ivcp_eval.interface import AbstractAdapter
    from ivcp_eval.runs.answering.session import Parts, Session

FILE = "timing.json"  # in each cell's folder; `reports.stats.timing` pairs them by session and index
ADVICE = "the next run times the cell again"


@dataclass(frozen=True)
class Times:
    """Milliseconds of one answer.

    Attributes:
        vision_ms: vision encoder and projector; None for a model without one. prefill_ms: of the decoder, selection
            included. decode_ms_per_token: after the first; None where there was none. A server shows neither of the
            first two, but when its first token came.
        end_to_end_ms: from opening the picture to the last token. first_token_ms: of a server, from sending to it.
    """

    vision_ms: float | None
    prefill_ms: float | None
    decode_ms_per_token: float | None
    end_to_end_ms: float
    first_token_ms: float | None = None


def time_cells(session: Session, dataset: Any, cells: Sequence[Cell], n: int) -> int:
    """Time ``n`` samples of one benchmark under all cells in turn, and write each cell's ``timing.json``.

    To be called once per model and benchmark, when it is answered, by one process that has its device to itself. Each
    cell first runs one sample untimed. A sample that fails under any cell is left out for all.

    Args:
        session: the model. dataset: VLMEvalKit's data set, whole.
        cells: the baseline's and the variants' on this benchmark; those that can run on the model (`Session.check`).
        n: samples, spread evenly over the benchmark, the same ones each time; 0 times nothing.

    Returns:
        How many samples were timed.
    """
    if not n or not cells:
        return 0
    rounds: dict[str, list[Times]] = {}
    for index, parts in chosen(session.adapter, dataset, n):
        order = list(range(len(cells)))
        if len(rounds) % 2:
            order.reverse()
        try:
            if not rounds:
                for i in order:  # the first call of a kernel also loads or tunes it
                    session.time(parts, cells[i].identity.variant)
            times = {i: session.time(parts, cells[i].identity.variant) for i in order}
        except FAILURES:  # answering it said why
            continue
        rounds[index] = [times[i] for i in range(len(cells))]
    samples = [[(index, times[i]) for index, times in rounds.items()] for i in range(len(cells))]
    write_times(cells, samples, {"device": session.device_name, "asked": n})
    return len(rounds)


def write_times(
    cells: Sequence[Cell], timed: Sequence[Sequence[tuple[str, Times]]], common: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]] = (),
) -> None:  # fmt: skip
    """Write each cell's ``timing.json``.

    Args:
        timed: of each cell the index and times of every sample, measured side by side. common: noted of all cells.
        own: of each cell what is noted of it alone.
    """
    session = {"session": secrets.token_hex(8), **common}
    samples = [[{"index": index, **asdict(times)} for index, times in of] for of in timed]
    # Beside each variant's times stand the baseline's: another variant may be timed later, and the baseline again.
    unpruned = [i for i, cell in enumerate(cells) if cell.identity.variant.method == BASELINE]
    beside = {"baseline": samples[unpruned[0]]} if unpruned else {}
    for i, cell in enumerate(cells):
        cell.folder.mkdir(parents=True, exist_ok=True)
        alone = own[i] if own else {}
        write_json(cell.folder / FILE, {**session, **alone, "samples": samples[i], **beside}, sealed=True)


def is_timed(cell: Cell, n: int) -> bool:
    """Whether the cell was timed on ``n`` samples (fewer where some fail), or cannot be on its model."""
    record = cell.load_record()
    if record is not None and record["status"] in ("skipped", "failed"):
        return True
    with suppress(DamagedError):
        return _read(cell)[0] >= n
    return False


def times_of(cell: Cell) -> dict[str, Times]:
    """What was measured of a cell, by the index of the sample; empty if it was not timed.

    Raises:
        DamagedError: its ``timing.json`` does not hold what this version writes.
    """
    return _read(cell)[1]


def throughput_of(cell: Cell) -> float | None:
    """Answers per second of a server; None where it was not measured. Raises as `times_of`."""
    path = cell.folder / FILE
    if not path.is_file():
        return None
    with damage_as_clear_error(path, ADVICE):
        rate = read_json(path, ADVICE).get("requests_per_s")
        if rate is not None and not (type(rate) in (int, float) and 0 <= rate < math.inf):
            raise TypeError("requests per second are no number")
    return rate


def _read(cell: Cell) -> tuple[int, dict[str, Times]]:
    """How many samples were asked for, 0 for a cell that was not timed, and the times; raises as `times_of`."""
    path = cell.folder / FILE
    if not path.is_file():
        return 0, {}
    content = read_json(path, ADVICE)
    with damage_as_clear_error(path, ADVICE):
        times = {str(sample.pop("index")): Times(**sample) for sample in content["samples"]}
        values = [value for timed in times.values() for value in vars(timed).values() if value is not None]
        if not all(type(value) in (int, float) and 0 <= value < math.inf for value in values):
            raise TypeError("a time is no number")
        return int(content.get("asked", 0)), times


def chosen(adapter: AbstractAdapter, dataset: Any, n: int) -> Iterator[tuple[str, Parts]]:
    """(index, conversation) of ``n`` rows spread evenly; rows whose picture cannot be read are left out."""
    from ivcp_eval.vlmeval_bridge.evaluate import messages
    from ivcp_eval.vlmeval_bridge.model import Prompting
    from ivcp_eval.vlmeval_bridge.reading import videos

    total = len(dataset.data)
    for row in sorted({(2 * i + 1) * total // (2 * n) for i in range(n)}):
        for prompt in messages(dataset, Prompting(adapter), row, row + 1):
            if prompt.message is not None:
                yield prompt.index, videos.parts(prompt.message)
