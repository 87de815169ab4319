"""What the per-sample files say: which answers flipped, on which pictures, where cells were kept, and by category."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ivcp_eval.benchmarks import agreement
from ivcp_eval.benchmarks.boxes import FORMATS, parse_answer
from ivcp_eval.interface.method import WHOLE, Rectangle
from ivcp_eval.interface.records.masks import Masks
from ivcp_eval.interface.records.sheets import sheet_of_masks
from ivcp_eval.reports.comparison import ComparedRow
from ivcp_eval.reports.html.model import AXES, Ability, Cut, Flip, FlipCount, FlipKind, Picture, Position, Shown
from ivcp_eval.reports.html.questions import Question, Questions, jpeg
from ivcp_eval.reports.stats import Paired, paired_bootstraps
from ivcp_eval.reports.table import Row, read_sample_columns

__all__ = ["Flips", "Measured", "Pair", "flips_of", "of_samples"]

KINDS: tuple[FlipKind, ...] = get_args(FlipKind)
_COLUMNS = ("index", "cluster", "category", "prediction", "answer", "score", "iou", "box", "masks")
_LONGEST = 600  # characters of a text that are shown
_MOST_MASKS = 200  # samples of a benchmark whose masks are read for the histogram
_MOST_VARIANTS = 12  # on one picture, the unpruned model among them
_BINS = 8
_RESAMPLES = 2000  # of a category
_UNPRUNED = "unpruned"

Sample = Mapping[str, Any]
Place = tuple[str, str, int | None]
"""What was asked: model, benchmark, limit."""


@dataclass(frozen=True)
class Pair:
    """A compared headline row, the results rows behind it (of the first seed), and their per-sample files."""

    compared: ComparedRow
    row: Row
    file: Path | None
    baseline: Row
    baseline_file: Path | None

    @property
    def place(self) -> Place:
        """What was asked."""
        return self.compared.model, self.compared.benchmark, self.compared.limit

    @property
    def variant(self) -> str:
        """Its name; where it has several seeds, with the one whose samples these are."""
        name, n = self.compared.variant, self.compared.n_seeds
        return name if n == 1 else f"{name} (seed {self.row['seed']}, one of {n})"


@dataclass
class Measured:
    """Over all samples.

    Attributes:
        flipped: number of a pair -> kind -> indices. drawn: what was asked -> indices whose kept cells are known.
    """

    flipped: dict[int, dict[FlipKind, list[str]]] = field(default_factory=dict)
    drawn: dict[Place, dict[str, None]] = field(default_factory=dict)
    positions: tuple[Position, ...] = ()
    abilities: tuple[Ability, ...] = ()
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flips:
    """Samples one by one."""

    counts: tuple[FlipCount, ...]
    flips: tuple[Flip, ...]
    pictures: tuple[Picture, ...]
    unread: tuple[str, ...]


def _read(path: Path) -> dict[str, Sample]:
    columns = read_sample_columns(path, _COLUMNS)
    return {row[0]: dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)}


class _Baselines:
    """The unpruned model's samples, one file at a time."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.samples: dict[str, Sample] = {}

    def of(self, path: Path) -> dict[str, Sample]:
        if path != self.path:
            self.path, self.samples = path, _read(path)
        return self.samples


def of_samples(pairs: Sequence[Pair], again: Sequence[Pair] = ()) -> Measured:
    """One pass over the files of all pairs; ``again``: those of the unpruned model's second answers."""
    measured, baselines = Measured(), _Baselines()
    grids: dict[tuple[str, str], _Places] = {}
    found: list[Ability] = []
    tests: list[Paired] = []
    damaged = 0
    for number, pair in enumerate(pairs):
        if pair.file is None or pair.baseline_file is None:
            continue
        before, after = baselines.of(pair.baseline_file), _read(pair.file)
        both = [(before[index], sample) for index, sample in after.items() if index in before]
        measured.flipped[number] = _flipped(both)
        for ability, test in _by_category(pair, both):
            found.append(ability)
            tests.append(test)
        places = grids.setdefault((pair.compared.model, pair.variant), _Places())
        masked = [(sample, unpruned["index"]) for unpruned, sample in both if sample["masks"]]
        measured.drawn.setdefault(pair.place, {}).update((index, None) for _, index in masked)
        for sample, _ in masked[:_MOST_MASKS]:
            masks = _masks(sample)
            damaged += masks is None
            if masks is not None:
                places.add(masks)
    results = paired_bootstraps(tests, resamples=_RESAMPLES) if tests else []
    ends, floors = [result.retained_interval for result in results], _floors(again, baselines)
    measured.abilities = tuple(
        replace(one, low=100 * end.low, high=100 * end.high, floor=floors.get(_category(one), math.nan))
        for one, end in zip(found, ends, strict=True)
    )
    measured.positions = tuple(position for (m, v), places in grids.items() for position in places.positions(m, v))
    measured.unread = (f"{damaged} records of kept cells cannot be read",) if damaged else ()
    return measured


def _category(one: Ability) -> tuple[str, str, str]:
    return one.model, one.benchmark, one.category


def _floors(again: Sequence[Pair], baselines: _Baselines) -> dict[tuple[str, str, str], float]:
    """Category -> `Ability.floor`."""
    floors: dict[tuple[str, str, str], float] = {}
    for pair in again:
        if pair.file is None or pair.baseline_file is None:
            continue
        before = baselines.of(pair.baseline_file)
        both = [(before[index], sample) for index, sample in _read(pair.file).items() if index in before]
        for one, _ in _by_category(pair, both):
            if math.isfinite(one.retained):
                floors[_category(one)] = max(floors.get(_category(one), 0.0), abs(one.retained - 100))
    return floors


def _flipped(both: Iterable[tuple[Sample, Sample]]) -> dict[FlipKind, list[str]]:
    """Indices are the baseline's own strings, so that those of many variants are held once."""
    found: dict[FlipKind, list[str]] = {kind: [] for kind in KINDS}
    for before, after in both:
        if before["score"] is None or after["score"] is None:
            continue
        if after["score"] != before["score"]:
            found["lost" if after["score"] < before["score"] else "gained"].append(before["index"])
        elif after["score"] < 1 and after["prediction"].strip() != before["prediction"].strip():
            found["changed"].append(before["index"])
    return found


def _by_category(pair: Pair, both: Sequence[tuple[Sample, Sample]]) -> Iterator[tuple[Ability, Paired]]:
    """Categories of a benchmark, or the benchmark where it has none."""
    groups: dict[str, list[tuple[Sample, Sample]]] = {}
    for before, after in both:
        if before["score"] is not None and after["score"] is not None:
            groups.setdefault(after["category"], []).append((before, after))
    for category, members in sorted(groups.items()):
        sides = [np.array([member[side]["score"] for member in members]) for side in (0, 1)]
        clusters = [before["cluster"] or f"index {before['index']}" for before, _ in members]
        first, second = (100 * float(side.mean()) for side in sides)
        retained = 100 * second / first if first else math.nan
        compared = pair.compared
        yield (
            Ability(
                compared.model,
                compared.benchmark,
                category,
                pair.variant,
                len(members),
                first,
                second,
                retained,
                math.nan,
                math.nan,
            ),
            Paired.of(sides[0], sides[1], clusters, scale=100),
        )


# -- where cells were kept --------------------------------------------------------------------------------------------


class _Places:
    """Cells, and kept cells, by where they lie in their pictures: pictures of all sizes share the bins."""

    def __init__(self) -> None:
        self.kept, self.all = np.zeros((3, _BINS)), np.zeros((3, _BINS))
        self.samples = 0

    def add(self, masks: Masks) -> None:
        """The last cut's, in the first view of every image that has one."""
        for image, cells in enumerate(masks.images):
            if not cells.views:
                continue
            mask, there = masks.mask(image), masks.view(image).cells >= 0
            down, across = ((np.arange(n) + 0.5) / n for n in mask.shape)
            y, x = np.meshgrid(down, across, indexing="ij")
            edge = 2 * np.maximum(abs(x - 0.5), abs(y - 0.5))
            for axis, place in enumerate((y, x, edge)):
                bins = np.minimum((_BINS * place).astype(int), _BINS - 1)
                self.all[axis] += np.bincount(bins[there], minlength=_BINS)
                self.kept[axis] += np.bincount(bins[there & mask], minlength=_BINS)
        self.samples += 1

    def positions(self, model: str, variant: str) -> Iterator[Position]:
        """For the histogram; bins without cells are left out."""
        for number, axis in enumerate(AXES):
            for place in range(_BINS):
                if cells := self.all[number, place]:
                    share = float(self.kept[number, place] / cells)
                    yield Position(model, variant, axis, (place + 0.5) / _BINS, share, self.samples)


def _masks(sample: Sample) -> Masks | None:
    """None where the text is no record; the caller counts these."""
    try:
        return Masks.from_text(sample["masks"])
    except ValueError:
        return None


# -- samples one by one -----------------------------------------------------------------------------------------------


def flips_of(pairs: Sequence[Pair], measured: Measured, cards: int, pictures: int) -> Flips:
    """Up to ``cards`` samples, of which up to ``pictures`` with their picture: variants, benchmarks and kinds in turn.

    Samples that flip under most variants go first.
    """
    often = Counter((pairs[n].place, i) for n, of in measured.flipped.items() for kind in KINDS for i in of[kind])
    queues = [
        [(n, kind, i) for i in sorted(measured.flipped[n][kind], key=lambda i: -often[pairs[n].place, i])]
        for kind in KINDS
        for n in measured.flipped
    ]
    flipped = ((pairs[n].place, i) for n, _, i in _in_turn(queues) if i in measured.drawn.get(pairs[n].place, ()))
    others = _in_turn([[(place, i) for i in drawn] for place, drawn in measured.drawn.items()])
    chosen: dict[tuple[Place, str], None] = {}
    for key in chain(flipped, others):
        if len(chosen) >= pictures:
            break
        chosen[key] = None
    picked = list(islice(_in_turn(queues), cards - len(chosen)))
    details = _Details(pairs, [*measured.flipped], {*chosen, *((pairs[n].place, index) for n, _, index in picked)})
    names = {key: f"picture-{number}" for number, key in enumerate(chosen)}
    flips = [
        details.flip(number, kind, index, names.get((pairs[number].place, index), "")) for number, kind, index in picked
    ]
    shown = tuple(details.picture(name, *key) for key, name in names.items())
    counts = []
    for number, of_kind in measured.flipped.items():
        row = pairs[number].compared
        lost, gained, changed = (len(of_kind[kind]) for kind in KINDS)
        again = row.noise_floor.answers_changed
        counts.append(FlipCount(row.model, row.benchmark, pairs[number].variant, lost, gained, changed, again))
    return Flips(tuple(counts), tuple(flips), shown, tuple(details.unread))


def _in_turn(queues: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """The first of each, then the second of each, ..."""
    for place in range(max(map(len, queues), default=0)):
        yield from (queue[place] for queue in queues if place < len(queue))


class _Details:
    """The chosen samples of all pairs and of the unpruned model, with their questions."""

    def __init__(self, pairs: Sequence[Pair], numbers: Sequence[int], chosen: set[tuple[Place, str]]) -> None:
        self.pairs, self.numbers = pairs, numbers
        self.samples: dict[int, dict[str, Sample]] = {}
        self.before: dict[tuple[Place, str], Sample] = {}
        self.questions: dict[str, Questions] = {}
        self.unread: list[str] = []
        baselines = _Baselines()
        for number in numbers:
            pair = pairs[number]
            indices = {index for place, index in chosen if place == pair.place}
            if not indices or pair.file is None or pair.baseline_file is None:
                continue
            self.samples[number] = {i: s for i, s in _read(pair.file).items() if i in indices}
            before = baselines.of(pair.baseline_file)
            self.before |= {(pair.place, index): before[index] for index in indices if index in before}
            name = pair.compared.benchmark
            if name not in self.questions:
                indices = {index for (_, benchmark, _), index in chosen if benchmark == name}
                self.questions[name] = Questions.read(
                    name, pair.baseline["benchmark_sha256"] or "", indices, pair.row["video"] or ""
                )
                if self.questions[name].missing:
                    self.unread.append(f"questions and pictures of {name}: {self.questions[name].missing}")

    def flip(self, number: int, kind: FlipKind, index: str, picture: str) -> Flip:
        """One card."""
        row = self.pairs[number].compared
        before, after = self.before[self.pairs[number].place, index], self.samples[number][index]
        first, second = _compared(_shortened(before["prediction"]), _shortened(after["prediction"]))
        return Flip(
            kind=kind,
            model=row.model,
            benchmark=row.benchmark,
            variant=self.pairs[number].variant,
            index=index,
            category=after["category"],
            question=_shortened(self._question(row.benchmark, index).text),
            gold="" if row.metric in agreement.METRICS else _shortened(after["answer"]),
            before=first,
            after=second,
            iou_before=_number(before["iou"]),
            iou_after=_number(after["iou"]),
            cut=max(len(before["prediction"]), len(after["prediction"])) > _LONGEST,
            picture=picture,
        )

    def picture(self, name: str, place: Place, index: str) -> Picture:
        """One card with a picture."""
        model, benchmark, _ = place
        question, before = self._question(benchmark, index), self.before[place, index]
        own = [n for n in self.numbers if self.pairs[n].place == place and index in self.samples.get(n, {})]
        # Those that answer differently first, where not all find room.
        own.sort(key=lambda n: self.samples[n][index]["score"] == before["score"])
        own = sorted(own[: _MOST_VARIANTS - 1])
        agreed = self.pairs[own[0]].compared.metric in agreement.METRICS
        missing, content, size = self.questions[benchmark].missing or "the file names no picture", b"", (0, 0)
        steps = max((_steps(self.samples[n][index]) for n in own), default=0)
        if (question.video and steps) or question.picture:
            try:
                content, size = jpeg(question.sheet(steps) if question.video and steps else question.picture)
                missing = ""
            except (OSError, ValueError) as error:
                missing = str(error)
        return Picture(
            name=name,
            model=model,
            benchmark=benchmark,
            index=index,
            question=_shortened(question.text),
            gold="" if agreed else _shortened(before["answer"]),
            box=question.box,
            jpeg=content,
            missing=missing,
            size=size,
            shown=(
                _shown(_UNPRUNED, before),
                *(_shown(self.pairs[n].variant, self.samples[n][index]) for n in own),
            ),
        )

    def _question(self, benchmark: str, index: str) -> Question:
        return self.questions[benchmark].by_index.get(index, Question("", None, ""))


def _steps(sample: Sample) -> int:
    """Of the first video that a sample shows; 0 if that is not known."""
    masks = _masks(sample) if sample["masks"] else None
    return sum(1 for image in masks.images if image.frame and image.frame.clip == 0) if masks else 0


def _shown(variant: str, sample: Sample) -> Shown:
    box: Rectangle | None = parse_answer(sample["box"], FORMATS["unit"])
    shown = Shown(
        variant,
        _shortened(sample["prediction"]),
        _number(sample["score"]),
        box,
        _number(sample["iou"]),
    )
    masks = _masks(sample) if sample["masks"] else None
    if masks is None or not masks.images:
        return shown
    masks = sheet_of_masks(masks)
    shown = replace(shown, tokens=masks.images[0].n_tokens)
    cuts = [Cut(cut.layer, masks.kept(0, number), (), ()) for number, cut in enumerate(masks.cuts)]
    if not masks.images[0].views:
        return replace(shown, cuts=tuple(cuts))
    view = masks.view(0)
    merged = np.zeros(view.cells.shape, dtype=bool)
    for number, cut in enumerate(cuts):
        dropped = ~masks.mask(0, 0, number) & (view.cells >= 0)
        merged |= masks.merged(0, 0, number)
        cells = [tuple(which.ravel().nonzero()[0].tolist()) for which in (dropped, merged & dropped)]
        cuts[number] = replace(cut, dropped=cells[0], merged=cells[1])
    rows, columns = view.cells.shape
    return replace(shown, grid=(rows, columns), covers=view.covers or WHOLE, cuts=tuple(cuts))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _compared(before: str, after: str) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]]:
    """Stretches of both texts, each with whether the other text has it too."""
    first, second = [], []
    for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        first += [(before[i:j], kind == "equal")] if j > i else []
        second += [(after[k:m], kind == "equal")] if m > k else []
    return tuple(first), tuple(second)
