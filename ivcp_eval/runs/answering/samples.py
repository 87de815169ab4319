"""Answers the samples of one unit under all variants: together, in smaller groups where that fails, or alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import clips
from ivcp_eval.files import DAMAGE, read_json, write_json
from ivcp_eval.interface.failures import FAILURES, device_lost, failure
from ivcp_eval.interface.records import Answer
from ivcp_eval.runs.answering.batching import Fits, batch_size, out_of_memory
from ivcp_eval.runs.answering.prompts import Prompts
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import RunPlan, Unit

if TYPE_CHECKING:
    from ivcp_eval.interface import AbstractAdapter
    from ivcp_eval.runs.answering.session import Session

Records = dict[str, Answer]  # by the key of the sample
Sample = tuple[str, list[dict[str, Any]]]  # the key of a sample and the parts of its prompt
Made = Sequence[Answer | None]  # per cell an answer, or None where none was made
Answered = tuple[str, Made]  # the key of a sample and what was made of it
MOST_LOSSES = 2  # workers that one answer may end: one batched with others, one alone


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
        try:
            losses = read_json(self.path, "each answer has one more try")
            whole = all(isinstance(n, int) for cells in losses.values() for n in cells.values())
        except (FileNotFoundError, *DAMAGE):
            return {}
        return losses if whole else {}

    def of(self, key: str, cell: Cell) -> int:
        """Workers that this answer ended, alone or batched with others."""
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

    def compare(self, session: Session, sample: Sample, answers: Made, cells: list[Cell], grounding: bool) -> None:
        """Answer one sample again, alone, and compare; one that fails alone is not counted."""
        for cell, answer in zip(cells, answers, strict=True):
            if answer and answer.together:
                with suppress(*FAILURES):
                    (alone,) = session.answer_all(sample[1], [cell.identity.variant], grounding, True)
                    self.agree += alone.prediction == answer.prediction
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
    fits: Fits | None = None,
) -> Iterator[Answered]:
    """(key, one answer per cell) of every sample that some cell lacks; ("", []) where a picture cannot be read.

    All cells answer even where only one lacks the sample, and all samples of a batch: in half precision rows depend on
    which others are batched with them, and a run that was interrupted shall end like one that was not. An answer that
    ended a worker is made alone, and is a failure for good once it did so again.

    Raises:
        DeviceLost: this process can answer nothing more.
    """
    if not cells:
        return
    exact, grounding = plan.options.exact, unit.benchmark.kind == "grounding"
    samples, broken = prompts_of(unit, session.adapter, dataset, cells[0])
    yield from [("", [])] * broken
    lacking = {
        key: open_
        for key, _ in samples
        if (open_ := [cell for cell, before in zip(cells, known, strict=True) if cell.needs_answer(before.get(key))])
    }
    if not lacking:
        return
    together = []
    for key, parts in samples:
        suspects = lacking.get(key, [])
        if any(losses.of(key, cell) for cell in suspects):
            given_up = [cell not in suspects or losses.of(key, cell) >= MOST_LOSSES for cell in cells]
            kept = [before.get(key) if done else None for before, done in zip(known, given_up, strict=True)]
            yield key, _one_by_one(session, (key, parts), cells, grounding, kept)
            del lacking[key]
        else:
            together.append((key, parts))
    first = next((sample for sample in together if sample[0] in lacking), None)
    batch = _batch(plan, session, together, exact, len(cells))
    for key, answers in answer_samples(session, together, lacking, cells, grounding, exact, batch, fits):
        if first and key == first[0]:
            agreement.compare(session, first, answers, cells, grounding)
        yield key, answers


def prompts_of(unit: Unit, adapter: AbstractAdapter, dataset: Any, cell: Cell) -> tuple[list[Sample], int]:
    """Every prompt of the unit once, and how many rows have none; their keys are noted for who scores."""
    from ivcp_eval.vlmeval_bridge.evaluate import messages
    from ivcp_eval.vlmeval_bridge.model import Prompting
    from ivcp_eval.vlmeval_bridge.reading.videos import parts

    rows = list(messages(dataset, Prompting(adapter), unit.start, unit.stop))
    Prompts.of(rows).note(cell, unit.start, unit.stop)
    samples = {row.key: parts(row.message) for row in rows if row.message is not None}
    return list(samples.items()), sum(row.message is None for row in rows)


def _batch(plan: RunPlan, session: Session, samples: list[Sample], exact: bool, variants: int) -> int:
    """Samples to answer together: what was asked for, or what fits."""
    if exact:
        return 1
    return plan.options.batch or batch_size(
        session, (parts for _, parts in sorted(samples, key=_size, reverse=True)), variants
    )


def answer_samples(
    session: Session,
    samples: list[Sample],
    lacking: Collection[str],
    cells: list[Cell],
    grounding: bool,
    exact: bool,
    batch: int,
    fits: Fits | None = None,
) -> Iterator[Answered]:
    """(key, one answer per cell); ``batch`` samples of about equal length together, if one of them is lacking.

    Args:
        fits: what is known not to fit together, and learns more.
    """
    fits = fits or Fits()
    if batch == 1 or exact:
        alone = [sample for sample in samples if sample[0] in lacking]
        yield from ((sample[0], answer_sample(session, sample, cells, grounding, exact)) for sample in alone)
        return
    samples = sorted(samples, key=_size)
    for start in range(0, len(samples), batch):
        group = samples[start : start + batch]
        if any(key in lacking for key, _ in group):
            yield from _answer_group(session, group, cells, grounding, fits)


def _answer_group(
    session: Session, group: list[Sample], cells: list[Cell], grounding: bool, fits: Fits
) -> Iterator[Answered]:
    """All samples together; a group that fails for any reason (memory, time, a corrupt picture) is halved.

    So is one that would not fit by what is known: into the same halves, whose rows are then rounded alike.
    """
    if len(group) == 1:
        yield group[0][0], answer_sample(session, group[0], cells, grounding, exact=False)
        return
    together: list[list[Answer]] = []
    half, size, ran_out = len(group) // 2, _tokens(group[-1]), False
    try:
        if len(group) <= (fits.most(size) or len(group)):
            variants = [cell.identity.variant for cell in cells]
            together = session.answer_batch([parts for _, parts in group], variants, grounding)
    except FAILURES as error:  # whose failure it is shows in the halves
        _check_device(session, error, group, cells)
        ran_out = out_of_memory(error)
    if together:
        fits.fitted(size, len(group))
        for (key, _), answers in zip(group, together, strict=True):
            yield key, [_as_kept(session, answer, together=True) for answer in answers]
        return
    for part in (group[:half], group[half:]):
        for key, made in _answer_group(session, part, cells, grounding, fits):
            ran_out = ran_out and not any(answer and answer.error for answer in made)
            yield key, made
    if ran_out:  # and it was not one sample that fits nowhere
        fits.too_many(size, len(group) - half)


def _tokens(sample: Sample) -> int:
    """About how long its prompt is: a visual token shows 28 x 28 pixels at most, a token of text is some letters."""
    pixels, characters = _size(sample)
    return pixels // 28**2 + characters // 4


def _size(sample: Sample) -> tuple[int, int]:
    """(pixels, characters), which order samples by the length of their prompts without encoding them."""
    from PIL import Image

    pixels = 0
    for part in sample[1]:
        try:
            if "video" in part:
                pixels += clips.pixels(part)
            elif "image" in part:
                with Image.open(part["image"]) as image:  # reads the header only
                    pixels += image.width * image.height
        except (OSError, Image.DecompressionBombError, clips.VideoRefused):
            pass  # answering it will say so
    return pixels, sum(len(part.get("text", "")) for part in sample[1])


def answer_sample(session: Session, sample: Sample, cells: list[Cell], grounding: bool, exact: bool) -> Made:
    """One answer per cell: together, and one by one where that fails, so that one variant cannot fail the others."""
    variants = [cell.identity.variant for cell in cells]
    together = len(variants) > 1 and not exact
    if len(variants) > 1:
        try:
            answers = session.answer_all(sample[1], variants, grounding, exact)
            return [_as_kept(session, answer, together) for answer in answers]
        except FAILURES as error:  # whose failure it is shows below, with its traceback
            _check_device(session, error, [sample], cells)
    return _one_by_one(session, sample, cells, grounding, [None] * len(cells))


def _one_by_one(session: Session, sample: Sample, cells: list[Cell], grounding: bool, kept: Made) -> Made:
    """One answer per cell: the one that is kept, or else one made alone."""
    answers = list(kept)
    for i, cell in enumerate(cells):
        if answers[i] is not None:
            continue
        try:
            (answers[i],) = session.answer_all(sample[1], [cell.identity.variant], grounding, True)
        except FAILURES as error:
            answers[i] = Answer.failed(error)
            if device_lost(session.model):
                raise DeviceLost(error, [(sample[0], answers)], [cell]) from error
    return answers


def _check_device(session: Session, error: BaseException, group: list[Sample], cells: list[Cell]) -> None:
    """Raise `DeviceLost` if what failed has left no GPU to try again on."""
    if device_lost(session.model):
        samples: list[Answered] = [(key, [Answer.failed(error)] * len(cells)) for key, _ in group]
        raise DeviceLost(error, samples, cells) from error


def _as_kept(session: Session, answer: Answer, together: bool) -> Answer:
    """A good answer as it is kept; one made among others says so where that can change it (see `cells.Cell`)."""
    return replace(answer, together=together and session.placement.dtype != "float32")
