"""Answers the samples of one unit under all variants: together, in smaller groups where that fails, or alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ivcp_eval.cells import Cell
from ivcp_eval.failures import FAILURES, failure
from ivcp_eval.sweep.plan import SweepPlan, Unit

if TYPE_CHECKING:
    from ivcp_eval.session import Session

Records = dict[str, dict[str, Any]]
Asked = tuple[str, list[dict[str, Any]]]  # the key of a sample and the parts of its prompt
Answered = tuple[str, list[dict[str, Any]]]  # its key and one record per cell
WINDOW = 8  # batches whose samples are sorted by length together


@dataclass
class Agreement:
    """How many answers made together in half precision equal those made alone; one sample of every unit is compared."""

    agree: int = 0
    compared: int = 0

    def look(
        self, session: Session, asked: Asked, records: list[dict[str, Any]], cells: list[Cell], grounding: bool
    ) -> None:
        """Answer one sample again, alone, and compare; one that fails alone is not counted."""
        for cell, record in zip(cells, records, strict=True):
            if record.get("together"):
                with suppress(*FAILURES):
                    (alone,) = session.answer_all(asked[1], [cell.identity.variant], grounding, True)
                    self.agree += alone["raw"] == record["raw"]
                    self.compared += 1


def answered_samples(
    plan: SweepPlan, unit: Unit, session: Session, cells: list[Cell], known: list[Records], agreement: Agreement
) -> Iterator[Answered]:
    """(key, one record per cell) of every sample that some cell lacks; ("", []) where a picture cannot be read.

    All cells answer even where only one lacks the sample: in half precision rows depend on their company, and a run
    that was interrupted shall end like one that was not.
    """
    from ivcp_eval.vlmeval_bridge.evaluate import build, messages
    from ivcp_eval.vlmeval_bridge.model import PrunedVLM

    if not cells:
        return
    request = plan.models[unit.model].request
    dataset = build(unit.benchmark, request.limit)
    model = PrunedVLM(session, cells[0].identity.variant)
    grounding = unit.benchmark.kind == "grounding"
    exact, batch = request.exact, int(plan.spec.options.get("batch", 1))
    asked: set[str] = set()
    first: Asked | None = None
    waiting: list[Asked] = []

    def answers() -> Iterator[Answered]:
        for key, records in answer_samples(session, waiting, cells, grounding, exact, batch):
            if first and key == first[0]:
                agreement.look(session, first, records, cells, grounding)
            yield key, records

    for sample in messages(dataset, model, unit.start, unit.stop):
        key = sample.key
        if sample.message is None:  # the picture cannot be read
            yield "", []
            continue
        if key in asked or not any(cell.lacks(before.get(key)) for cell, before in zip(cells, known, strict=True)):
            continue
        asked.add(key)
        waiting.append((key, [{part["type"]: part["value"]} for part in sample.message]))
        first = first or waiting[0]
        if len(waiting) >= (batch if batch == 1 else batch * WINDOW):
            yield from answers()
            waiting = []
    yield from answers()


def answer_samples(
    session: Session,
    samples: list[Asked],
    cells: list[Cell],
    grounding: bool,
    exact: bool,
    batch: int,
) -> Iterator[Answered]:
    """(key, one record per cell) of every sample; ``batch`` samples of about equal length together."""
    if batch > 1 and not exact:
        samples = sorted(samples, key=lambda sample: _size(sample[1]))
    for start in range(0, len(samples), batch):
        group = samples[start : start + batch]
        if exact:
            yield from ((key, answer_sample(session, parts, cells, grounding, exact)) for key, parts in group)
        else:
            yield from _answer_group(session, group, cells, grounding)


def _answer_group(session: Session, group: list[Asked], cells: list[Cell], grounding: bool) -> Iterator[Answered]:
    """All samples together; a group that fails for any reason (memory, time, a corrupt picture) is halved."""
    if len(group) == 1:
        yield group[0][0], answer_sample(session, group[0][1], cells, grounding, exact=False)
        return
    together: list[list[dict[str, Any]]] = []
    with suppress(*FAILURES):  # whose failure it is shows in the halves
        together = session.answer_batch([parts for _, parts in group], [c.identity.variant for c in cells], grounding)
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


def answer_sample(
    session: Session, parts: list[dict[str, Any]], cells: list[Cell], grounding: bool, exact: bool
) -> list[dict[str, Any]]:
    """One record per cell: together, and one by one where that fails, so that one variant cannot fail the others."""
    variants = [cell.identity.variant for cell in cells]
    company = len(variants) > 1 and not exact
    if len(variants) > 1:
        with suppress(*FAILURES):  # whose failure it is shows below, with its traceback
            found = session.answer_all(parts, variants, grounding, exact)
            return [_noted(session, record, company) for record in found]
    records = []
    for variant in variants:
        try:
            (record,) = session.answer_all(parts, [variant], grounding, True)
            records.append(_noted(session, record, company=False))
        except FAILURES as error:
            records.append(dict(failure(error)))
    return records


def _noted(session: Session, record: dict[str, Any], company: bool) -> dict[str, Any]:
    """A good answer as it is kept; one made in company says so where that can change it (see `cells.Cell`)."""
    together = {"together": True} if company and session.placement.dtype != "float32" else {}
    return {**record, **together, "error": ""}
