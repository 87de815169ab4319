"""Times, measured apart from answering: some samples under the baseline and every variant in turn, in one process.

Answers are made in batches and in one pass for all variants, so none of them has a time of its own. After a benchmark
is answered, a few of its samples therefore run again, each variant alone. A sample runs under all variants before the
next one does, every second time in the opposite order, so that drift of the machine (clocks, other users) cancels in
the ratio of a variant to the baseline.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from ivcp_eval.files import write_json
from ivcp_eval.interface.failures import FAILURES
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.runs.planning.cells import Cell

if TYPE_CHECKING:
    from ivcp_eval.runs.answering.session import Parts, Session

SAMPLES = 16


@dataclass(frozen=True)
class Times:
    """Milliseconds of one answer.

    Attributes:
        vision_ms: vision encoder and projector; None for a model without one. prefill_ms: of the decoder, selection
            included. decode_ms: per token after the first; None where there was none.
        total_ms: from opening the picture to the last token.
    """

    vision_ms: float | None
    prefill_ms: float
    decode_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class Timed:
    """One sample under one variant, and under the baseline in the same round.

    Attributes:
        baseline: None in the baseline's own cell, and where no baseline was timed beside it.
    """

    own: Times
    baseline: Times | None


@dataclass(frozen=True)
class Timings:
    """What ``timing.json`` of a cell holds.

    Attributes:
        session: equal in the cells that were timed in turn, in one process. device: what they were timed on.
        samples: by index, in the order in which they ran.
    """

    session: str = ""
    device: str = ""
    samples: Mapping[str, Timed] = field(default_factory=dict)

    def medians(self) -> dict[str, float | None]:
        """Medians of the cell's own times, under the names of the results CSV."""
        own = [timed.own for timed in self.samples.values()]
        return {
            "vision_ms_median": _median(times.vision_ms for times in own),
            "prefill_ms_median": _median(times.prefill_ms for times in own),
            "decode_ms_per_token_median": _median(times.decode_ms for times in own),
        }

    def pairs(self, name: str) -> tuple[list[float], list[float]]:
        """(of the variant, of the baseline) of the samples that have both, for `reports.stats.timing.time_ratio`.

        Args:
            name: a field of `Times`.
        """
        both = [
            (getattr(timed.own, name), getattr(timed.baseline, name))
            for timed in self.samples.values()
            if timed.baseline is not None
        ]
        kept = [(own, other) for own, other in both if own and other]
        return [own for own, _ in kept], [other for _, other in kept]


def time_cells(session: Session, dataset: Any, cells: Sequence[Cell], n: int = SAMPLES) -> int:
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
    baseline = next((i for i, cell in enumerate(cells) if cell.identity.variant.method == BASELINE), None)
    rounds: dict[str, list[Times]] = {}
    for index, parts in _chosen(session, dataset, n):
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
    name = secrets.token_hex(8)
    for i, cell in enumerate(cells):
        paired = {
            index: Timed(times[i], times[baseline] if baseline is not None and baseline != i else None)
            for index, times in rounds.items()
        }
        _write(cell, Timings(name, session.device_name, paired))
    return len(rounds)


def timings_of(cell: Cell) -> Timings:
    """What was measured of a cell; no samples if it was not timed.

    Raises:
        ValueError: its ``timing.json`` does not hold what this version writes.
    """
    path = cell.folder / "timing.json"
    if not path.is_file():
        return Timings()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        samples = {
            entry["index"]: Timed(Times(**entry["own"]), Times(**entry["baseline"]) if entry["baseline"] else None)
            for entry in found["samples"]
        }
        return Timings(found["session"], found["device"], samples)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); delete it, and the cell is timed again") from error


def _write(cell: Cell, timings: Timings) -> None:
    samples = [
        {"index": index, "own": asdict(timed.own), "baseline": asdict(timed.baseline) if timed.baseline else None}
        for index, timed in timings.samples.items()
    ]
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_json(cell.folder / "timing.json", {**vars(timings), "samples": samples})


def _chosen(session: Session, dataset: Any, n: int) -> Iterator[tuple[str, Parts]]:
    """(index, conversation) of ``n`` rows spread evenly; rows whose picture cannot be read are left out."""
    from ivcp_eval.vlmeval_bridge.evaluate import messages
    from ivcp_eval.vlmeval_bridge.model import Prompting

    total = len(dataset.data)
    for row in sorted({(2 * i + 1) * total // (2 * n) for i in range(n)}):
        for asked in messages(dataset, Prompting(session.adapter), row, row + 1):
            if asked.message is not None:
                yield asked.index, [{part["type"]: part["value"]} for part in asked.message]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
