"""The acceptance table of the second embedded model, from verdicts on every condition.

Each row is one figure of ``evaluate``'s table: what was measured, with its paired, clustered interval, and whether it
passes. Differences are in points, condition minus reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from ivcp_eval.reports.stats import PairedResult, paired_bootstrap
from ivcp_eval.reports.stats.verdicts import Verdicts


@dataclass(frozen=True)
class Figure:
    """One row of the table; ``passed`` is None where nothing is demanded or it could not be measured."""

    number: str
    what: str
    measured: str
    passed: bool | None


def table(
    grounding: Verdicts, short: Verdicts, two_pictures: Verdicts, order: Verdicts, layers: Verdicts
) -> list[Figure]:
    """All figures but A12, which ``ivcp eval`` measures on the file of ``ivcp lab easy-vqa``."""
    return [
        *_unpruned(grounding, short),
        _retained(grounding),
        _recall(grounding),
        _random(grounding),
        _half_target(grounding),
        *_without_coordinates(grounding, short),
        *_foreground(grounding),
        *_fastv(grounding),
        _plateau(layers),
        Figure(
            "A11",
            "grounding in the named one of two pictures",
            two_pictures.estimate("none"),
            two_pictures.percent("none") >= 80,
        ),
        _order(order),
    ]


def _order(order: Verdicts) -> Figure:
    whole, still = order.percent("none"), order.percent("one picture")
    error = 196 * (still / 100 * (1 - still / 100) / len(order.clusters)) ** 0.5
    measured = f"{whole:.1f} %; a single picture {still:.1f} +- {error:.1f} %, chance 33.3 %"
    return Figure("A11", "order question on clips", measured, whole >= 80 and still - error <= 100 / 3)


def _unpruned(grounding: Verdicts, short: Verdicts) -> list[Figure]:
    boxes, words = grounding.percent("none"), short.percent("none")
    changed = sum(a != b for a, b in zip(grounding.scores["none"], grounding.scores["none again"], strict=True))
    return [
        Figure("A1", "unpruned grounding", grounding.estimate("none"), boxes >= 90),
        Figure("A1", "unpruned short answers", short.estimate("none"), words >= 90),
        Figure("A1", "flips in a second unpruned run", str(changed), changed == 0),
    ]


def _retained(grounding: Verdicts) -> Figure:
    result = grounding.against("ivc_prune 0.5", "none")
    enough = result.retained >= 0.97 and result.retained_interval.low >= 0.95
    return Figure("A2", "retained by IVC-Prune at 0.5", _retained_percent(result), enough)


def _recall(grounding: Verdicts) -> Figure:
    ours, chance = grounding.recall["value 0.5"], grounding.recall["random 0.5"]
    result = paired_bootstrap(chance, ours, grounding.clusters, scale=100)
    measured = f"{result.pruned:.1f} %, random {result.baseline:.1f} %, {_points(result)} to it, p {result.p_value:.2g}"
    passed = result.pruned >= 75 and result.difference > 0 and result.p_value < 0.001
    return Figure("A3", "target tokens kept by the value stage at 0.5", measured, passed)


def _random(grounding: Verdicts) -> Figure:
    results = [grounding.against(f"random {r}", f"ivc_prune {r}") for r in (0.25, 0.11)]
    measured = "; ".join(_points(r) for r in results)
    passed = all(r.difference <= -5 and r.difference_interval.high < 0 for r in results)
    return Figure("A4", "random against IVC-Prune at 0.25; 0.11", measured, passed)


def _half_target(grounding: Verdicts) -> Figure:
    result = grounding.against("half of the target dropped", "none")
    return Figure("A5", "half of the target's tokens dropped", _points(result), result.difference >= -3)


def _without_coordinates(grounding: Verdicts, short: Verdicts) -> list[Figure]:
    boxes, words = (v.against("all but IVC", "none") for v in (grounding, short))
    control = grounding.against("all but IVC outside the target", "all but as many outside the target")
    clear = control.difference <= -3 and control.difference_interval.high < 0
    return [
        Figure("A6", "all but IVC, grounding", _points(boxes), -16 <= boxes.difference <= -8),
        Figure("A6", "all but IVC, short answers", _points(words), abs(words.difference) <= 1),
        Figure("A7", "IVC outside the target against as many others there", _points(control), clear),
    ]


def _foreground(grounding: Verdicts) -> list[Figure]:
    alone, with_ivc, with_random = (
        grounding.against(name, "none") for name in ("target only", "target + IVC", "target + as many")
    )
    control = grounding.against("target + as many", "target + IVC")
    below = control.difference < 0 and control.difference_interval.high < 0
    return [
        Figure("A8", "retained by the target alone", _retained_percent(alone), alone.retained <= 0.6),
        Figure("A8", "retained by target + IVC", _retained_percent(with_ivc), with_ivc.retained >= 0.97),
        Figure(
            "A8", "target + as many random", f"{_retained_percent(with_random)}, {_points(control)} to + IVC", below
        ),
    ]


def _fastv(grounding: Verdicts) -> list[Figure]:
    loss = grounding.against("fastv", "none")
    regained = grounding.against("fastv+ivc", "fastv")
    enough = regained.difference >= -loss.difference / 2 and regained.difference_interval.low > 0
    return [
        Figure("A9", "FastV at IVC-Prune's layer-mean tokens", _points(loss), loss.difference <= -5),
        Figure("A9", "regained by FastV+IVC (at least half)", _points(regained), enough),
    ]


def _plateau(layers: Verdicts) -> Figure:
    values = [layers.percent(name) for name in layers.scores]
    best, longest, run = max(values), 0, 0
    edge = len(values) // 4  # the first and the last layers are no middle ones
    for value in values[edge : len(values) - edge]:
        run = run + 1 if value >= best - 2 else 0
        longest = max(longest, run)
    measured = ", ".join(f"{name} {value:.1f}" for name, value in zip(layers.scores, values, strict=True))
    return Figure("A10", "grounding over the cut layer (plateau of 3)", measured, longest >= 3)


def _retained_percent(result: PairedResult) -> str:
    low, high = 100 * result.retained_interval.low, 100 * result.retained_interval.high
    return f"{100 * result.retained:.1f} % [{low:.1f}, {high:.1f}]"


def _points(result: PairedResult) -> str:
    interval = result.difference_interval
    return f"{result.difference:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
