"""Answers the samples of one unit under all variants: together, in smaller groups where that fails, or alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.files import write_json
from ivcp_eval.interface.failures import FAILURES, device_lost, failure
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import RunPlan, Unit

if TYPE_CHECKING:
    from ivcp_eval.runs.answering.session import Session

Records = dict[str, dict[str, Any]]
Asked = tuple[str, list[dict[str, Any]]]  # the key of a sample and the parts of its prompt
Made = Sequence[dict[str, Any] | None]  # per cell a record, or None where none was made
Answered = tuple[str, Made]  # the key of a sample and what was made of it
WINDOW = 8  # batches whose samples are sorted by length together
MOST_LOSSES = 2  # workers that one answer may end: one in company, one alone


class DeviceLost(RuntimeError):
    """The process lost its GPU while it answered (`failures.device_lost`); it can answer nothing more.

    Attributes:
        samples: what is known of those it was at. cells: under which variants, one of which is the cause.
    """

    def __init__(self, error: BaseException, samples: list[Answered], cells: list[Cell]) -> None:
        self.samples, self.cells = samples, cells
        line = failure(error)["error"].partition("\n")[0]
        super().__init__(
            f"this process lost its GPU ({line}) and ends. What it was at is noted and tried again alone once, then "
            "only with --retry-failed. Nothing else is lost: other workers go on, or run the same command again. "
            "Should every worker end like this, look at the GPU (nvidia-smi, dmesg)"
        )


@dataclass
class Losses:
    """How many workers each answer of a unit ended; a file, which whoever holds the unit's claim may write."""

    path: Path

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """Key of a sample -> hash of a cell -> number."""
        found: dict[str, dict[str, int]] = {}
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else found

    def of(self, key: str, cell: Cell) -> int:
        """Workers that this answer ended, alone or in company."""
        return self.counts.get(key, {}).get(cell.identity.hash, 0)

    def add(self, lost: DeviceLost) -> None:
        """Count one more for all that may be the cause."""
        for key, _ in lost.samples:
            for cell in lost.cells:
                self.counts.setdefault(key, {})[cell.identity.hash] = self.of(key, cell) + 1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.counts)


@dataclass
class Agreement:
    """How many answers made together in half precision equal those made alone; one sample of every unit is compared."""

    agree: int = 0
    compared: int = 0

    def look(self, session: Session, asked: Asked, records: Made, cells: list[Cell], grounding: bool) -> None:
        """Answer one sample again, alone, and compare; one that fails alone is not counted."""
        for cell, record in zip(cells, records, strict=True):
            if record and record.get("together"):
                with suppress(*FAILURES):
                    (alone,) = session.answer_all(asked[1], [cell.identity.variant], grounding, True)
                    self.agree += alone["raw"] == record["raw"]
                    self.compared += 1


def answered_samples(
    plan: RunPlan,
    unit: Unit,
    session: Session,
    dataset: Any,
    cells: list[Cell],
    known: list[Records],
    losses: Losses,
    agreement: Agreement,
) -> Iterator[Answered]:
    """(key, one record per cell) of every sample that some cell lacks; ("", []) where a picture cannot be read.

    All cells answer even where only one lacks the sample, and all samples of a batch: in half precision rows depend on
    their company, and a run that was interrupted shall end like one that was not. An answer that ended a worker is made
    alone, and is a failure for good once it did so again.

    Raises:
        DeviceLost: this process can answer nothing more.
    """
    from ivcp_eval.vlmeval_bridge.evaluate import messages
    from ivcp_eval.vlmeval_bridge.model import PrunedVLM

    if not cells:
        return
    model = PrunedVLM(session, cells[0].identity.variant)
    grounding = unit.benchmark.kind == "grounding"
    exact, batch = plan.options.exact, plan.options.batch or 1
    asked: set[str] = set()
    lacking: set[str] = set()
    first: Asked | None = None
    waiting: list[Asked] = []

    def answers() -> Iterator[Answered]:
        for key, records in answer_samples(session, waiting, lacking, cells, grounding, exact, batch):
            if first and key == first[0]:
                agreement.look(session, first, records, cells, grounding)
            yield key, records

    for sample in messages(dataset, model, unit.start, unit.stop):
        key = sample.key
        if sample.message is None:  # the picture cannot be read
            yield "", []
            continue
        open_ = [cell for cell, before in zip(cells, known, strict=True) if cell.lacks(before.get(key))]
        if key in asked or (not open_ and (batch == 1 or exact)):
            continue
        asked.add(key)
        parts = [{part["type"]: part["value"]} for part in sample.message]
        if any(losses.of(key, cell) for cell in open_):
            given_up = [cell not in open_ or losses.of(key, cell) >= MOST_LOSSES for cell in cells]
            kept = [before.get(key) if done else None for before, done in zip(known, given_up, strict=True)]
            yield key, _one_by_one(session, (key, parts), cells, grounding, kept)
            continue
        waiting.append((key, parts))
        if open_:
            lacking.add(key)
            first = first or waiting[-1]
        if len(waiting) >= (batch if batch == 1 else batch * WINDOW):
            yield from answers()
            waiting = []
    yield from answers()


def answer_samples(
    session: Session,
    samples: list[Asked],
    lacking: Collection[str],
    cells: list[Cell],
    grounding: bool,
    exact: bool,
    batch: int,
) -> Iterator[Answered]:
    """(key, one record per cell); ``batch`` samples of about equal length together, if one of them is lacking."""
    if batch > 1 and not exact:
        samples = sorted(samples, key=lambda sample: _size(sample[1]))
    for start in range(0, len(samples), batch):
        group = samples[start : start + batch]
        if exact:
            yield from ((asked[0], answer_sample(session, asked, cells, grounding, exact)) for asked in group)
        elif any(key in lacking for key, _ in group):
            yield from _answer_group(session, group, cells, grounding)


def _answer_group(session: Session, group: list[Asked], cells: list[Cell], grounding: bool) -> Iterator[Answered]:
    """All samples together; a group that fails for any reason (memory, time, a corrupt picture) is halved."""
    if len(group) == 1:
        yield group[0][0], answer_sample(session, group[0], cells, grounding, exact=False)
        return
    together: list[list[dict[str, Any]]] = []
    try:
        together = session.answer_batch([parts for _, parts in group], [c.identity.variant for c in cells], grounding)
    except FAILURES as error:  # whose failure it is shows in the halves
        _check_device(session, error, group, cells)
    if together:
        for (key, _), records in zip(group, together, strict=True):
            yield key, [_noted(session, record, company=True) for record in records]
        return
    half = len(group) // 2
    yield from _answer_group(session, group[:half], cells, grounding)
    yield from _answer_group(session, group[half:], cells, grounding)


def _size(parts: list[dict[str, Any]]) -> tuple[int, int]:
    """(pixels, characters), which order samples by the length of their prompts without encoding them."""
    from PIL import Image

    pixels = 0
    for part in parts:
        if "image" in part:
            try:
                with Image.open(part["image"]) as image:  # reads the header only
                    pixels += image.width * image.height
            except (OSError, Image.DecompressionBombError):
                pass  # answering it will say so
    return pixels, sum(len(part.get("text", "")) for part in parts)


def answer_sample(session: Session, asked: Asked, cells: list[Cell], grounding: bool, exact: bool) -> Made:
    """One record per cell: together, and one by one where that fails, so that one variant cannot fail the others."""
    variants = [cell.identity.variant for cell in cells]
    company = len(variants) > 1 and not exact
    if len(variants) > 1:
        try:
            found = session.answer_all(asked[1], variants, grounding, exact)
            return [_noted(session, record, company) for record in found]
        except FAILURES as error:  # whose failure it is shows below, with its traceback
            _check_device(session, error, [asked], cells)
    return _one_by_one(session, asked, cells, grounding, [None] * len(cells))


def _one_by_one(session: Session, asked: Asked, cells: list[Cell], grounding: bool, kept: Made) -> Made:
    """One record per cell: the one that is kept, or else an answer alone."""
    records = list(kept)
    for i, cell in enumerate(cells):
        if records[i] is not None:
            continue
        try:
            (record,) = session.answer_all(asked[1], [cell.identity.variant], grounding, True)
            records[i] = _noted(session, record, company=False)
        except FAILURES as error:
            records[i] = dict(failure(error))
            if device_lost(session.model):
                raise DeviceLost(error, [(asked[0], records)], [cell]) from error
    return records


def _check_device(session: Session, error: BaseException, group: list[Asked], cells: list[Cell]) -> None:
    """Raise `DeviceLost` if what failed has left no GPU to try again on."""
    if device_lost(session.model):
        samples: list[Answered] = [(key, [failure(error)] * len(cells)) for key, _ in group]
        raise DeviceLost(error, samples, cells) from error


def _noted(session: Session, record: dict[str, Any], company: bool) -> dict[str, Any]:
    """A good answer as it is kept; one made in company says so where that can change it (see `cells.Cell`)."""
    together = {"together": True} if company and session.placement.dtype != "float32" else {}
    return {**record, **together, "error": ""}
