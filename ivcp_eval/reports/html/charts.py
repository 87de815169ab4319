"""The report's plots as Altair charts, for the page and, as SVG and PNG, for papers.

All text from results is data of a chart, never part of its programs; labels that it forms are plain SVG text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.reports.html.model import AXES, COSTS, Ability, Mark, Panel, Pareto, Position, Report

if TYPE_CHECKING:
    import altair as alt

__all__ = ["abilities", "charts", "panel", "pareto", "positions", "save"]

_PALETTE = (
    *("#0b6fb8", "#c8501e", "#1d8a4e", "#8f4bb3", "#a8322d", "#7a5c3e", "#c2318a", "#5f6b12", "#0f8a94", "#3a45b0"),
    *("#d08a00", "#4f7d2f", "#b5476b", "#2f6d6a", "#6d4ad0", "#8b6b00", "#1f5d9e", "#9a3f00", "#57606a", "#00766a"),
)
_RANDOM, _FLOOR, _BASELINE = "#6b6b6b", "#9a9a9a", "#1a1a1a"
_STANDING = ("better than random", "not better than random", "not measured beside random")
_MOST_CATEGORIES, _MOST_VARIANTS = 40, 12


def charts(report: Report) -> dict[str, alt.LayerChart]:
    """Every plot of a report by a name that is unique in it and safe as that of a file."""
    found = {}
    for number, one in enumerate(report.paretos):
        for cost in costs_measured(one.marks):
            found[f"pareto-{number}-{cost}"] = pareto(one, cost, report.methods)
    for number, one_panel in enumerate(report.panels):
        found[f"panel-{number}"] = panel(one_panel, report.methods)
    for number, (model, axis) in enumerate(dict.fromkeys((one.model, one.axis) for one in report.positions)):
        there = [one for one in report.positions if (one.model, one.axis) == (model, axis)]
        found[f"position-{number}"] = positions(there)
    for number, model in enumerate(dict.fromkeys(one.model for one in report.abilities)):
        found[f"ability-{number}"] = abilities([one for one in report.abilities if one.model == model])
    return found


def costs_measured(marks: Sequence[Mark]) -> list[str]:
    """Those of `COSTS` that some variant has."""
    return [cost for cost in COSTS if any(math.isfinite(mark.costs[cost]) for mark in marks)]


def pareto(one: Pareto, cost: str, methods: Sequence[str]) -> alt.LayerChart:
    """Mean retained percent against one of `COSTS`, random's band and the noise floor behind."""
    levels = ((100.0, one.floor),)
    return _score_against_cost(one.marks, cost, levels, methods, "retained, % (mean over benchmarks)", 340)


def panel(one: Panel, methods: Sequence[str]) -> alt.LayerChart:
    """Score of one benchmark against tokens."""
    cost = next(iter(costs_measured(one.marks)), "layers")
    levels = ((one.baseline, one.floor), *one.others)
    return _score_against_cost(one.marks, cost, levels, methods, one.metric, 180, legend=False)


def _score_against_cost(
    marks: Sequence[Mark], cost: str, levels: Sequence[tuple[float, float]], methods: Sequence[str], y: str,
    height: int, legend: bool = True,
) -> alt.LayerChart:  # fmt: skip
    """``levels``: scores of the unpruned model, each with its noise floor."""
    import altair as alt

    drawn = [mark for mark in marks if math.isfinite(mark.costs[cost]) and math.isfinite(mark.score)]
    values = [_value(mark, cost) for mark in drawn]
    own = [value for value, mark in zip(values, drawn, strict=True) if not mark.random]
    random = sorted((v for v, mark in zip(values, drawn, strict=True) if mark.random), key=lambda v: v["cost"])
    ends = [end for v in values for end in (v["low"], v["score"], v["high"]) if end is not None]
    stripes = [(level, floor if floor > 0 else 0.0) for level, floor in levels]
    domain = _domain([*ends, *(level + sign * floor for level, floor in stripes for sign in (-1, 1))])
    axis = alt.Axis(tickCount=5, labelOverlap=True)
    x = alt.X("cost:Q", title=f"{COSTS[cost]} (share)", scale=alt.Scale(zero=False, nice=True), axis=axis)
    score = alt.Y("score:Q", title=y, scale=alt.Scale(domain=domain))
    layers: list[alt.Chart] = []
    # Without any none was measured, or no benchmark changed its score, which the page says in words.
    if bands := [{"low": level - floor, "high": level + floor} for level, floor in stripes if floor]:
        band = alt.Chart(_inline(bands))
        layers.append(
            band.mark_rect(color=_FLOOR, opacity=0.35, description="noise floor: second run of the baseline").encode(
                y=alt.Y("low:Q", scale=alt.Scale(domain=domain), title=y), y2="high:Q"
            )
        )
    layers.append(
        alt.Chart(_inline([{"score": level} for level, _ in levels]))
        .mark_rule(color=_BASELINE, strokeDash=[5, 3])
        .encode(y=score)
    )
    tooltip = [
        alt.Tooltip("variant:N"),
        alt.Tooltip("score:Q", format=".2f"),
        alt.Tooltip("low:Q", format=".2f", title="95 % from"),
        alt.Tooltip("high:Q", format=".2f", title="to"),
        alt.Tooltip("cost:Q", format=".3f", title=COSTS[cost]),
        alt.Tooltip("standing:N", title="against random"),
    ]
    if random:
        chart = alt.Chart(_inline(random))
        layers += [
            chart.mark_area(color=_RANDOM, opacity=0.18).encode(x=x, y=alt.Y("low:Q", title=y), y2="high:Q"),
            chart.mark_line(color=_RANDOM, strokeDash=[2, 2]).encode(x=x, y=score),
            chart.mark_rule(color=_RANDOM).encode(x=x, y=alt.Y("low:Q", title=y), y2="high:Q"),
            chart.mark_point(color=_RANDOM, filled=True, shape="diamond", size=55, opacity=1).encode(
                x=x, y=score, tooltip=tooltip
            ),
        ]
    shown = _legend(2, "circle") if legend else None
    colour = alt.Color("method:N", title=None, scale=_scale(methods), legend=shown)
    # No layer is empty: its mark would be a picture without a description to a screen reader.
    solid = [value for value in own if value["standing"] == _STANDING[0]]
    hollow = [value for value in own if value["standing"] != _STANDING[0]]
    if own:
        chart = alt.Chart(_inline(own))
        layers += [
            chart.mark_line(strokeWidth=1, opacity=0.6).encode(x=x, y=score, color=colour),
            chart.mark_rule(strokeWidth=1.6).encode(x=x, y=alt.Y("low:Q", title=y), y2="high:Q", color=colour),
        ]
    if solid:
        points = alt.Chart(_inline(solid)).mark_point(filled=True, size=75, opacity=1)
        layers.append(points.encode(x=x, y=score, color=colour, tooltip=tooltip))
    if hollow:
        points = alt.Chart(_inline(hollow)).mark_point(filled=True, fill="white", size=75, strokeWidth=2, opacity=1)
        stroke = alt.Stroke("method:N", scale=_scale(methods), legend=None)
        layers.append(points.encode(x=x, y=score, stroke=stroke, tooltip=tooltip))
    return _page(alt.layer(*layers), height)


def positions(there: Sequence[Position]) -> alt.LayerChart:
    """Which share of the cells each of the first variants kept, by where they lie along one axis."""
    import altair as alt

    names = list(dict.fromkeys(one.variant for one in there))[:_MOST_VARIANTS]
    drawn = [one for one in there if one.variant in names]
    values = [{"variant": one.variant, "place": one.place, "share": 100 * one.share} for one in drawn]
    colour = alt.Color("variant:N", title=None, scale=_scale(names), legend=_legend(1, "stroke"))
    line = alt.Chart(_inline(values)).mark_line(point=True, interpolate="monotone")
    encoded = line.encode(
        x=alt.X("place:Q", title=AXES[there[0].axis], scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
        y=alt.Y("share:Q", title="cells kept, %", scale=alt.Scale(domain=[0, 100])),
        color=colour,
        tooltip=["variant:N", alt.Tooltip("share:Q", format=".0f", title="cells kept, %")],
    )
    return _page(alt.layer(encoded), 180)


def abilities(there: Sequence[Ability]) -> alt.LayerChart:
    """Retained percent of the first variants by category, the noise floor behind; of many categories those with most
    samples."""
    import altair as alt

    names = list(dict.fromkeys(one.variant for one in there))[:_MOST_VARIANTS]
    sizes = {(one.benchmark, one.category): one.n for one in there}
    drawn = {*sorted(sizes, key=lambda key: -sizes[key])[:_MOST_CATEGORIES]}
    values: list[dict[str, Any]] = [
        {
            "category": f"{one.benchmark}: {one.category}" if one.category else one.benchmark,
            "variant": one.variant,
            "retained": _finite(one.retained),
            "n": one.n,
            "floor": _finite(one.floor),
        }
        for one in there
        if (one.benchmark, one.category) in drawn and one.variant in names
    ]
    categories = list(dict.fromkeys(value["category"] for value in values))
    base = alt.Chart(_inline(values)).encode(
        y=alt.Y("category:N", title=None, sort=categories, axis=alt.Axis(labelLimit=130)),
    )
    points = base.mark_point(filled=True, size=60, opacity=0.9).encode(
        x=alt.X("retained:Q", title="retained, %", scale=alt.Scale(zero=False)),
        color=alt.Color("variant:N", title=None, scale=_scale(names), legend=_legend(1, "circle")),
        tooltip=["category:N", "variant:N", alt.Tooltip("retained:Q", format=".1f"), "n:Q"],
    )
    full = alt.Chart(_inline([{"retained": 100}])).mark_rule(color=_BASELINE, strokeDash=[5, 3]).encode(x="retained:Q")
    stripes = [
        {"category": category, "low": 100 - floor, "high": 100 + floor}
        for category, floor in {value["category"]: value["floor"] for value in values}.items()
        if floor
    ]
    layers = [full, points]
    if stripes:
        stripe = alt.Chart(_inline(stripes)).mark_rule(
            color=_FLOOR, opacity=0.35, strokeWidth=14, description="noise floor: second run of the baseline"
        )
        layers.insert(0, stripe.encode(y=alt.Y("category:N", title=None, sort=categories), x="low:Q", x2="high:Q"))
    return _page(alt.layer(*layers), max(120, 26 * len(categories)))


def save(report: Report, folder: Path) -> list[Path]:
    """Every plot as SVG and as PNG (twice the resolution of a screen); the files, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chart in charts(report).items():
        sized = chart.properties(width=420)
        for kind, scale in (("svg", 1), ("png", 2)):
            path = folder / f"{name}{_variant_suffix(report, name)}.{kind}"
            sized.save(path, format=kind, scale_factor=scale)
            written.append(path)
    return written


def _variant_suffix(report: Report, name: str) -> str:
    """What a file shows, in letters that any file system takes."""
    kind, number = name.split("-")[:2]
    said = {"panel": [p.benchmark for p in report.panels], "pareto": [p.model for p in report.paretos]}.get(kind)
    return "" if said is None else "-" + re.sub(r"[^A-Za-z0-9.]+", "_", said[int(number)])[:60]


def _value(mark: Mark, cost: str) -> dict[str, Any]:
    standing = _STANDING[2] if mark.better is None else _STANDING[0] if mark.better else _STANDING[1]
    ends = {name: _finite(getattr(mark, name)) for name in ("score", "low", "high")}
    return {"variant": mark.variant, "method": mark.method, "cost": mark.costs[cost], "standing": standing, **ends}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _domain(values: Iterable[float]) -> list[float]:
    """A little beyond what is drawn."""
    found = list(values)
    low, high = min(found), max(found)
    room = 0.06 * (high - low) or 1.0
    return [low - room, high + room]


def _scale(names: Sequence[str]) -> alt.Scale:
    import altair as alt

    colours = [_PALETTE[number % len(_PALETTE)] for number in range(len(names))]
    return alt.Scale(domain=list(names), range=colours)


def _legend(columns: int, symbol: str) -> alt.Legend:
    """Below the plot, narrow enough for a telephone."""
    import altair as alt

    return alt.Legend(orient="bottom", columns=columns, labelLimit=240 // columns, symbolType=symbol)


def _inline(values: Sequence[Mapping[str, Any]]) -> alt.InlineData:
    import altair as alt

    return alt.InlineData(values=[dict(value) for value in values])


def _page(chart: alt.LayerChart, height: int) -> alt.LayerChart:
    """As wide as there is room."""
    return (
        chart.properties(width="container", height=height, background="white")
        .configure(font="system-ui, sans-serif", autosize={"type": "fit-x", "contains": "padding"})
        .configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal", gridColor="#e6e6e6")
        .configure_legend(labelFontSize=12)
    )
