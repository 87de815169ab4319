"""How far answers agree with those of the unpruned model, for pictures without known answers.

Agreement is not accuracy: it says how much of the model's behaviour survives pruning, be it right or wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from ivcp_eval.benchmarks.boxes import FORMATS, iou, parse_answer

NOTE = "agreement with the unpruned model's answers, not accuracy"
#: Metric names, the headline first.
TEXT_METRICS = ("agreement", "agreement_text_similarity")
BOX_METRICS = ("agreement_iou@0.5", "agreement_mean_iou", "agreement_exact")
METRICS = (*TEXT_METRICS, *BOX_METRICS)


@dataclass(frozen=True)
class Agreement:
    """Of the answers to a data set.

    Attributes:
        metrics: name -> percent. samples: index -> 1 for an answer that agrees, else 0.
        similarities: of the texts, 1 for equal ones, by index. ious: of boxes, by index.
    """

    metrics: dict[str, float]
    samples: dict[str, float]
    similarities: dict[str, float]
    ious: dict[str, float]


def agreement(given: Mapping[str, str], reference: Mapping[str, str], boxes: bool) -> Agreement:
    """Compare answers with the unpruned model's.

    Texts agree if they are equal but for blanks around them; similarity is `difflib`'s ratio. Boxes agree if their
    intersection over union is at least 0.5; equal texts agree whether or not they hold a box.

    Args:
        given, reference: answers by index; every index of ``reference`` counts, one without an answer agrees with none.
        boxes: whether answers are boxes, as fractions of the picture.
    """
    pairs = {index: (text.strip(), given.get(index, "").strip()) for index, text in reference.items()}
    exact = {index: float(before == now and index in given) for index, (before, now) in pairs.items()}
    similar = {
        index: exact[index] or (SequenceMatcher(None, *pair).ratio() if index in given else 0.0)
        for index, pair in pairs.items()
    }
    if boxes:
        ious = {index: exact[index] or (_iou(*pair) if index in given else 0.0) for index, pair in pairs.items()}
        samples = {index: float(value >= 0.5) for index, value in ious.items()}
        columns = dict(zip(BOX_METRICS, (samples, ious, exact), strict=True))
        return Agreement(_percent(columns), samples, similar, ious)
    return Agreement(_percent(dict(zip(TEXT_METRICS, (exact, similar), strict=True))), exact, similar, {})


def _percent(columns: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: 100 * sum(values.values()) / len(values) for name, values in columns.items() if values}


def _iou(before: str, now: str) -> float:
    first, second = (parse_answer(text, FORMATS["unit"]) for text in (before, now))
    return iou(first, second) if first and second else 0.0
