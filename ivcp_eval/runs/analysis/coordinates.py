"""Do coordinate tokens matter, or the target they cover? Selections made by hand, of all grounding questions.

IVC-Prune's ablation drops the tokens that carry implicit coordinates and loses accuracy. Those tokens lie in stripes
that also run through the object that is asked for. Here the same cut is made with and without them, and with as many
tokens drawn at random in their place, inside and outside of the object (`CONDITIONS`). Every difference is paired.

The target's tokens are those that show any part of the true box. Coordinate tokens are the published set of the
retention ratio 0.5 (`ops.coordinate_set`), computed from the model's own rotary spectrum.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ivcp_eval.benchmarks.boxes import Box
from ivcp_eval.benchmarks.grounding import ground_truth
from ivcp_eval.engine.fork import Ready
from ivcp_eval.engine.run import Run
from ivcp_eval.files import file_digest
from ivcp_eval.interface import (
    AbstractMethod,
    Cut,
    Faithfulness,
    ImageSpan,
    ModelFacts,
    Selection,
    Signals,
    Unsupported,
)
from ivcp_eval.interface.ops import budget, coordinate_set
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.registry import adapter, make_method
from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.stats.verdicts import Verdicts
from ivcp_eval.runs.analysis.study import Study, compared, label, named, with_holm

Tokens = np.ndarray[Any, Any]

UNPRUNED = "unpruned"
#: Condition -> the one it is compared with. The first of each row of the table in docs/analyses.md.
CONDITIONS: Mapping[str, str] = {
    "target + random background, 0.5": UNPRUNED,
    "target + random background, 0.25": UNPRUNED,
    "half of the target + random background, 0.5": UNPRUNED,
    "target only": UNPRUNED,
    "target + as many": UNPRUNED,
    "target + IVC": "target + as many",
    "all but as many": UNPRUNED,
    "all but IVC": "all but as many",
    "all but as many outside the target": UNPRUNED,
    "all but IVC outside the target": "all but as many outside the target",
}
RATIO = 0.5  # at which the coordinate set is taken, and of the methods beside


def kept_tokens(n: int, target: Tokens, ivc: Tokens, rng: np.random.Generator) -> dict[str, Tokens]:
    """The tokens that each of `CONDITIONS` keeps, increasing; all sets hold indices of the picture's ``n`` tokens."""
    everything = np.arange(n)
    outside = rng.permutation(np.setdiff1d(everything, target))
    ivc_outside = np.setdiff1d(ivc, target)
    as_many = outside[: len(ivc_outside)]
    half = rng.permutation(target)[: -(-len(target) // 2)]

    def filled(tokens: Tokens, ratio: float) -> Tokens:
        return np.union1d(tokens, outside[: max(0, budget(ratio, n) - len(tokens))])

    return {
        "target + random background, 0.5": filled(target, 0.5),
        "target + random background, 0.25": filled(target, 0.25),
        "half of the target + random background, 0.5": filled(half, 0.5),
        "target only": np.unique(target),
        "target + as many": np.union1d(target, as_many),
        "target + IVC": np.union1d(target, ivc),
        "all but as many": np.setdiff1d(everything, rng.permutation(everything)[: len(ivc)]),
        "all but IVC": np.setdiff1d(everything, ivc),
        "all but as many outside the target": np.setdiff1d(everything, as_many),
        "all but IVC outside the target": np.setdiff1d(everything, ivc_outside),
    }


def covered(span: ImageSpan, box: Box) -> Tokens:
    """Indices of the image's tokens that show any part of ``box`` (fractions of the picture).

    Raises:
        Unsupported: the family's tokens form neither one grid nor square tiles with a thumbnail behind them.
    """
    if span.grid is not None:
        return _in_grid(span.grid, box)
    sides = {round(view**0.5) for view in span.views}
    if span.tiles and len(sides) == 1 and all(round(view**0.5) ** 2 == view for view in span.views):
        side, (wide, high) = sides.pop(), span.tiles
        tiles = [(row, column) for row in range(high) for column in range(wide)]
        if len(span.views) in (len(tiles), len(tiles) + 1):
            columns = []
            for number, view in enumerate(span.views):
                row, column = tiles[number] if number < len(tiles) else (0, 0)
                across, down = (wide, high) if number < len(tiles) else (1, 1)
                x1, y1, x2, y2 = box
                local = (x1 * across - column, y1 * down - row, x2 * across - column, y2 * down - row)
                columns.append(_in_grid((side, side), local) + number * view)
            return np.concatenate(columns)
    raise Unsupported(
        "the model's visual tokens form neither one grid nor square tiles, so it is not known which of them show the "
        "target; families whose do: Qwen's, and InternVL"
    )


def _in_grid(grid: tuple[int, int], box: Box) -> Tokens:
    rows, columns = grid
    row, column = np.divmod(np.arange(rows * columns), columns)
    x1, y1, x2, y2 = box[0] * columns, box[1] * rows, box[2] * columns, box[3] * rows
    return np.flatnonzero((column < x2) & (column + 1 > x1) & (row < y2) & (row + 1 > y1))


@dataclass(frozen=True)
class Controlled(AbstractMethod):
    """Keeps the tokens of one of `CONDITIONS`, whatever the model thinks.

    Attributes:
        condition: which. box: the target, as fractions of the only picture. layer: the cut, and every layer's cache.
        ivc, ivc_share: of the coordinate set, as in IVC-Prune. seed: of what is drawn, with the question's own.
        columns: after the cut the prompt columns of the target's tokens.
    """

    faithfulness: ClassVar[Faithfulness] = "control"

    condition: str
    box: Box
    layer: int
    ivc: float = 0.1
    ivc_share: float = 0.2
    seed: tuple[int, int] = (0, 0)
    columns: list[int] = field(default_factory=list, compare=False)

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut; the ratio is that of the coordinate set."""
        return (Cut(self.layer, ratio),)

    def select(self, signals: Signals) -> Selection:
        """What the condition says."""
        if len(signals.images) != 1:
            raise Unsupported(f"the question has {len(signals.images)} pictures; a target is known in one only")
        (image,) = signals.images
        cos, sin = (part.mean(dim=(0, 2))[signals.visual[image.tokens]] for part in signals.rope())
        ivc = coordinate_set(cos, sin, image, self.ivc, self.ivc_share).nonzero().flatten().cpu().numpy()
        target = covered(image.span, self.box)
        self.columns[:] = image.span.columns[torch.as_tensor(target)].tolist()
        kept = kept_tokens(len(image.tokens), target, ivc, np.random.default_rng(self.seed))[self.condition]
        return Selection(image.tokens[torch.as_tensor(kept, device=image.tokens.device)], exact=False)


@dataclass
class Recalls:
    """Which share of the target's tokens survived, in a file beside the answers; one JSON line for each question.

    Attributes:
        known: key of a question -> condition -> share. file: of all of them; a line that a kill cut short is dropped.
    """

    file: Any
    known: dict[str, dict[str, float]] = field(default_factory=dict)

    def load(self) -> Recalls:
        """What the file holds."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else ():
            try:
                key, shares = json.loads(line)
            except ValueError:
                continue
            self.known.setdefault(key, {}).update(shares)
        return self

    def add(self, key: str, shares: Mapping[str, float]) -> None:
        """Keep them."""
        self.known.setdefault(key, {}).update(shares)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write("\n" * (stream.tell() > 0) + json.dumps([key, dict(shares)]))


def measure(
    study: Study, layer: int | None = None, seed: int = 0, ivc: float = 0.1, ivc_share: float = 0.2, bar: Any = iter
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The table, one row per condition, and the settings it was made with.

    Args:
        layer: of the cut of all hand-made selections; default: of the first cut of the study's first method.
        bar: shows the progress over the questions.

    Raises:
        ValueError: no grounding benchmark. Unsupported: see `covered`.
    """
    if study.benchmark.kind != "grounding":
        raise ValueError(f"{study.benchmark.name} has no boxes; name a grounding benchmark, see `ivcp list --all`")
    if layer is None:
        layer = _layer_of(study, study.pruned[0].identity.variant)
    settings = {"layer": layer, "seed": seed, "ivc": ivc, "ivc_share": ivc_share, "ratio": RATIO}
    variants = {UNPRUNED: study.baseline.identity.variant}
    variants |= {label(cell.identity.variant): cell.identity.variant for cell in study.pruned}
    digest = study.digest(settings, [named(cell) for cell in study.pruned], file_digest(__file__))
    recalls = Recalls(study.folder / "answers" / f"{digest}.recall.jsonl").load()
    boxes = {str(row["index"]): ground_truth(row).box for row in _rows(study)}
    answers: dict[str, dict[str, Answer]] = {}
    order = study.questions()
    with study.kept(digest):
        for question in bar(order):
            by_hand = {
                name: Controlled(
                    name, boxes[question.index], layer, ivc, ivc_share, (seed, zlib.crc32(question.key.encode()))
                )
                for name in CONDITIONS
            }
            runs: dict[str, Run] = {}
            ready = {name: Ready(method, RATIO) for name, method in by_hand.items()}
            for name, answer in study.answers(question, {**variants, **ready}, runs.update).items():
                answers.setdefault(name, {})[question.index] = answer
            columns = torch.tensor(next((method.columns for method in by_hand.values() if method.columns), []))
            if len(columns):
                recalls.add(
                    question.key,
                    {name: float(torch.isin(columns, run.kept[0]).float().mean()) for name, run in runs.items()},
                )
    known = {q.index: recalls.known.get(q.key, {}) for q in order}
    return _table(study, answers, known), {**settings, "digest": digest}


def _layer_of(study: Study, variant: Variant) -> int:
    wired = adapter(study.model.weights.family)
    facts = wired.facts(wired.config(str(study.model.weights.source)), study.model.weights.family)
    return make_method(variant.method, variant.parameters).cuts(facts, variant.ratio)[0].layer


def _rows(study: Study) -> list[dict[str, Any]]:
    table = study.dataset.data.drop(columns="image")
    for frame, side in (("answer_width", "width"), ("answer_height", "height")):
        if frame not in table:
            table[frame] = table[side]
    rows: list[dict[str, Any]] = table.to_dict("records")
    return rows


def _table(
    study: Study, by_condition: Mapping[str, Mapping[str, Answer]], recalls: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    samples = {name: study.samples(answers) for name, answers in by_condition.items()}
    indices = list(samples[UNPRUNED])
    verdicts = Verdicts([samples[UNPRUNED][index].cluster for index in indices])
    for name, scored in samples.items():
        verdicts.scores[name] = [float(scored[index].score or 0) for index in indices]
        verdicts.recall[name] = [recalls[index][name] for index in indices if name in recalls.get(index, {})]
    rows = [
        _row(verdicts, name, CONDITIONS.get(name, UNPRUNED), list(answers.values()))
        for name, answers in by_condition.items()
    ]
    return with_holm(rows)


def _row(verdicts: Verdicts, name: str, reference: str, answers: Sequence[Answer]) -> dict[str, Any]:
    result = verdicts.against(name, reference) if name != reference else None
    kept = [
        answer.visual_kept / answer.visual_tokens for answer in answers if answer.visual_kept and answer.visual_tokens
    ]
    shares = verdicts.recall[name]
    return {
        "condition": name,
        "kept": 100 * float(np.mean(kept)) if kept else None,
        "recall": 100 * float(np.mean(shares)) if shares else None,
        "score": verdicts.percent(name),
        **compared(result, reference),
        "n": len(verdicts.clusters),
        "clusters": len(set(verdicts.clusters)),
        "failed": sum(bool(answer.error) for answer in answers),
    }
