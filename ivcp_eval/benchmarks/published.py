"""Published results of the field, one table: copied from papers and repositories, nothing here was measured by us.

``results/baselines/field/numbers.csv`` holds the numbers, ``sources.csv`` where each was read, ``README.md`` what the
columns mean and what to beware of. Between sources even the unpruned scores differ by points, so `Published.retained`
is the share of the same source's own unpruned score.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ivcp_eval.files import BASELINES

__all__ = ["AVERAGE", "AVERAGES", "KEPT_MEANS", "Average", "Published", "Range", "numbers", "range_beside", "sources"]

FOLDER = BASELINES / "field"
AVERAGE = "AVERAGE"  # in place of a benchmark: the source's own average
#: What a source's share of kept tokens is a share of.
KEPT_MEANS: Mapping[str, str] = {
    "none": "nothing is pruned",
    "before_llm": "tokens that enter the language model: all layers have as many",
    "layer_mean": "mean over the layers, stated",
    "layer_mean_by_custom": "as printed; in this line of papers the mean over the layers",
    "after_cut": "tokens after the one cut; the mean over the layers is higher",
    "several_cuts": "several cuts, one of which is printed",
    "upper_limit": "of the largest number of tokens that a picture can have",
    "not_stated": "not said",
}


@dataclass(frozen=True)
class Average:
    """A mean over benchmarks that the IVC-Prune paper prints: of each score in percent of the unpruned model's.

    Attributes:
        name: in place of a benchmark in ``results/baselines/ivc_prune_paper.csv``. words: what it is. benchmarks: over
            which; no less is that average.
    """

    name: str
    words: str
    benchmarks: tuple[str, ...]

    def published(self, checkpoint: str, method: str) -> str:
        """What the paper prints of a method, in words; empty where it prints nothing."""
        for row in _rows(BASELINES / "ivc_prune_paper.csv"):
            if (row["model"], row["method"], row["benchmark"]) == (checkpoint, method, self.name):
                score = f"{float(row['score']):g} %"
                if row["ratio_kept_final"]:
                    return f"{score}, with {100 * float(row['ratio_kept_final']):g} % of the tokens kept"
                if row["ratio_layer_mean"]:
                    return f"{score}, with {100 * float(row['ratio_layer_mean']):g} % of the tokens, mean over layers"
                return score
        return ""


_REFCOCO = ("RefCOCO_val", "RefCOCO_testA", "RefCOCO_testB", "RefCOCO+_val", "RefCOCO+_testA", "RefCOCO+_testB")
_VQA = ("SEEDBench_IMG", "MMBench_DEV_EN_V11", "MMStar", "MME", "POPE", "HallusionBench", "RealWorldQA")
AVERAGES = (
    Average("average_8_grounding", "8 grounding splits", (*_REFCOCO, "RefCOCOg_val", "RefCOCOg_test")),
    Average("average_9_vqa", "9 VQA benchmarks", (*_VQA, "TextVQA_VAL", "AI2D_TEST")),
)


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        source: key of `sources`.
        model, printed_method: as printed. checkpoint, method: our names for them; empty where we have none.
        benchmark: VLMEvalKit's name by our mapping, or `AVERAGE`. metric: what is known of it, or what is averaged.
        kept_percent: of the visual tokens, by ``kept_means`` (`KEPT_MEANS`); None if not printed. kept_tokens: as
            printed.
        score, unpruned: on the source's scale; None where it prints shares only.
        printed_share: percent of the unpruned score, where the source prints that.
        origin: authors | re-run | quoted | re-run or quoted | port | unpruned: whose number it is.
        note: what to beware of.
    """

    source: str
    model: str
    checkpoint: str
    printed_method: str
    method: str
    benchmark: str
    metric: str
    kept_percent: float | None
    kept_tokens: str
    kept_means: str
    score: float | None
    unpruned: float | None
    printed_share: float | None
    origin: str
    note: str

    @property
    def retained(self) -> float | None:
        """Percent of the same source's unpruned score."""
        if self.printed_share is not None or not self.unpruned or self.score is None:
            return self.printed_share
        return 100 * self.score / self.unpruned

    def is_named(self, model: str | None, method: str | None, benchmark: str | None) -> bool:
        """Whether it is of these, by our names or the printed ones, whatever the case; None is any."""
        return (
            _is(model, self.model, self.checkpoint)
            and _is(method, self.printed_method, self.method)
            and _is(benchmark, self.benchmark)
        )


def _is(name_given: str | None, *names: str) -> bool:
    return name_given is None or name_given.casefold() in {name.casefold() for name in names if name}


@cache
def numbers(folder: Path = FOLDER) -> tuple[Published, ...]:
    """Every published number, in the order of the file."""
    return tuple(_number(row) for row in _rows(folder / "numbers.csv"))


@cache
def sources(folder: Path = FOLDER) -> Mapping[str, str]:
    """Where the numbers were read, by `Published.source`."""
    return {row["source"]: f"{row['reference']}: {row['place']}" for row in _rows(folder / "sources.csv")}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream, strict=True)


def _number(row: Mapping[str, str]) -> Published:
    values: dict[str, Any] = dict(row)
    for name in ("kept_percent", "score", "unpruned", "retained_percent"):
        values[name] = float(row[name]) if row[name] else None
    return Published(printed_share=values.pop("retained_percent"), **values)


@dataclass(frozen=True)
class Range:
    """What sources say of one method on one benchmark at about one share of kept tokens.

    Attributes:
        lowest, highest: percent retained. numbers: how many there are. sources: of which sources.
    """

    lowest: float
    highest: float
    numbers: int
    sources: Sequence[str]


def range_beside(
    published: Iterable[Published], checkpoint: str, method: str, benchmark: str, kept: float, tolerance: float
) -> Range | None:
    """The range of what was published beside one of our own rows; None if nothing was.

    Args:
        checkpoint, method, benchmark: our names. kept: share of kept visual tokens in percent. tolerance: how far a
            published share may be from it.
    """
    beside = [
        number
        for number in published
        if (number.checkpoint, number.method, number.benchmark) == (checkpoint, method, benchmark)
        and number.kept_percent is not None
        and abs(number.kept_percent - kept) <= tolerance
        and number.retained is not None
    ]
    shares = [number.retained for number in beside if number.retained is not None]
    if not shares:
        return None
    return Range(min(shares), max(shares), len(shares), tuple(dict.fromkeys(number.source for number in beside)))
