"""Makes the page of a report: one file, which holds everything and asks no host for anything.

Everything that comes from results is escaped by Jinja2, in the text, in attributes and in the JSON of script elements;
a content security policy lets only the page's own scripts run, by their hashes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ivcp_eval
from ivcp_eval import benchmarks
from ivcp_eval.files import atomic_write
from ivcp_eval.reports import terminal
from ivcp_eval.reports.html.model import AXES, COSTS, Ability, Picture, Report, Spread
from ivcp_eval.reports.stats.timing import TimeRatio

if TYPE_CHECKING:
    from ivcp_eval.reports.comparison import ComparedRow
    from ivcp_eval.reports.views.decision import Verdict

__all__ = ["MOST_BYTES", "MissingExtra", "check_installed", "figures", "page", "write"]

MOST_BYTES = 3_000_000  # of a page without its pictures
_MOST_ROWS = 400  # of a table
_LARGE_CSV = 300_000  # bytes from which it is compressed
_MOST_CSV = 800_000  # bytes up to which it is in the page
_BLOCKS = {
    **{"verdict": "Verdict", "floor": "A/A noise floor", "pareto": "Score against cost", "panels": "Benchmarks"},
    **{"table": "All comparisons", "flips": "Flips", "pictures-block": "What was kept", "abilities": "Abilities"},
    **{"cost": "Cost", "provenance": "Provenance"},
}
_KINDS = {"lost": "Lost", "gained": "Gained", "changed": "Not right, yet different"}


class MissingExtra(ImportError):
    """The libraries of the extra ``report`` are not installed."""


def check_installed() -> None:
    """Raises MissingExtra, which says what to install."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"a report needs Jinja2, Altair and vl-convert, and {error.name} is not installed: "
            "pip install 'ivcp-eval[report]' (in a checkout: pip install '.[report]', or make setup)"
        ) from error


def write(report: Report, path: Path) -> None:
    """Write the page, atomically. Raises as `page`."""
    text = page(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(text)


def figures(report: Report, folder: Path) -> list[Path]:
    """Every plot as SVG and PNG; the files. Raises MissingExtra."""
    check_installed()
    from ivcp_eval.reports.html import charts

    return charts.save(report, folder)


def page(report: Report, most_bytes: int = MOST_BYTES) -> str:
    """The page; where it would be larger than ``most_bytes`` without its pictures, with fewer cards and rows.

    Raises:
        MissingExtra: see there. ValueError: it is too large without any card.
    """
    check_installed()
    template, size = _filled(report), 0
    for part in (1.0, 0.5, 0.25, 0.1, 0.0):
        pictures = report.pictures[: round(part * len(report.pictures))]
        names = {picture.name for picture in pictures}  # no flip may lead to a picture that was left out
        flips = report.flips[: round(part * len(report.flips))]
        flips = tuple(one if one.picture in names else replace(one, picture="") for one in flips)
        most_rows = round(part * _MOST_ROWS)
        text = template(
            report=replace(report, flips=flips, pictures=pictures),
            rows=_headlines_first(report.comparison.rows)[:most_rows],
            abilities=report.abilities[:most_rows],
            pictures={picture.name: _drawn(picture) for picture in pictures},
        )
        size = len(text.encode()) - sum(len(_data_uri(picture.jpeg)) for picture in pictures)
        if size <= most_bytes:
            return text
    raise ValueError(
        f"the report takes {size} bytes without a single card, {most_bytes} are allowed: choose fewer rows, or split "
        "the results into several files"
    )


def _filled(report: Report) -> Callable[..., str]:
    """The template with all that cards and rows do not change."""
    import jinja2
    from markupsafe import Markup

    from ivcp_eval.reports.html import charts

    own = Path(__file__).parent
    scripts = [_vega(), (own / "report.js").read_text(encoding="utf-8")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(own), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= _FILTERS
    csv_name, csv = _csv(report)
    return partial(
        environment.get_template("page.html").render,
        version=ivcp_eval.__version__,
        # Markup is what is not escaped: the package's own files and Vega.
        css=Markup((own / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        script_hashes=Markup(" ".join(f"'sha256-{digest}'" for digest in hashes)),
        blocks=list(_BLOCKS.items()),
        kinds=_KINDS,
        costs=[charts.costs_measured(one.marks) for one in report.paretos],
        cost_names=COSTS,
        unmoved=[one.benchmark for one in report.panels if one.unmoved],
        floor_words=_floor_words(report),
        has_first_token=any(_known(one.first_token) for one in report.decision.verdicts) if report.decision else False,
        has_random=any(mark.random for panel in report.panels for mark in panel.marks),
        footer=terminal.footer(report.comparison),
        csv=csv,
        csv_name=csv_name,
        position_charts=[(m, AXES[axis]) for m, axis in dict.fromkeys((p.model, p.axis) for p in report.positions)],
        specs={name: chart.to_dict() for name, chart in charts.charts(report).items()},
    )


def _floor_words(report: Report) -> str:
    """What the plots show of it."""
    if not report.again:
        return "No noise floor was measured."
    if all(one.unmoved for one in report.panels):
        unmoved = "no benchmark changed its score when the baseline answered again"
        return f"The noise floor is 0: {unmoved}, so no plot has a grey stripe."
    return "Grey stripe: the noise floor."


def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, which nothing in it may end early."""
    convert: Any = import_module("vl_convert")  # its stubs miss the default of the argument
    bundle: str = convert.javascript_bundle()
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _headlines_first(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    return sorted(rows, key=lambda row: row.metric != benchmarks.headline(vars(row)))


def _csv(report: Report) -> tuple[str, str]:
    """Name and data URI of the comparison's CSV; compressed where it is large, "" where it is too large even so."""
    stream = io.StringIO()
    report.comparison.to_csv(stream)
    content, name, kind = stream.getvalue().encode(), f"{report.title}.comparison.csv", "text/csv"
    if len(content) > _LARGE_CSV:
        content, name, kind = gzip.compress(content, mtime=0), f"{name}.gz", "application/gzip"
    if len(content) > _MOST_CSV:
        return name, ""
    return name, f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _drawn(picture: Picture) -> dict[str, Any]:
    """What the script needs to draw."""
    found: dict[str, Any] = _without_nan(asdict(replace(picture, jpeg=b"")))
    del found["jpeg"]
    return found | {"size": _size(picture)}


def _size(picture: Picture) -> tuple[int, int]:
    """(width, height) of the picture, or of its grid where the picture is not here."""
    grids = [one.grid for one in picture.shown if one.grid]
    if picture.jpeg or not grids:
        return picture.size if picture.jpeg else (1, 1)
    rows, columns = grids[0]
    return 28 * columns, 28 * rows


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return [_without_nan(inner) for inner in value] if isinstance(value, list | tuple) else value


# -- how numbers are written ------------------------------------------------------------------------------------------


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if _known(value) else "-"


def _score(value: float, row: ComparedRow) -> str:
    return _number(value, 3 if row.score_scale <= 1 else 1)


def _difference(row: ComparedRow) -> str:
    digits = 3 if row.score_scale <= 1 else 1
    ends = [row.difference_low, row.difference_high]
    interval = f"[{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]" if all(map(_known, ends)) else "[none]"
    return f"{row.difference:+.{digits}f} {interval}" + ("" if row.paired else " unpaired")


def _floor_text(row: ComparedRow) -> str:
    return terminal.floor_text(row.noise_floor, 3 if row.score_scale <= 1 else 1) or "-"


def _verdict_floor(one: Verdict) -> str:
    return terminal.floor_text(one.noise_floor, 2) or "-"


def _retained(one: Ability) -> str:
    if not (_known(one.low) and _known(one.high)):
        return _number(one.retained, 1)
    return f"{one.retained:.1f} [{one.low:.1f}, {one.high:.1f}]"


def _spread(spread: Spread) -> str:
    digits = 1 if spread.median < 100 else 0
    return f"{spread.median:.{digits}f} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"


def _ratio(time: TimeRatio) -> str:
    return terminal.time_cell(time) or "-"


def _bytes(value: float) -> str:
    if not _known(value):
        return "-"
    return f"{value / 2**20:.1f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"


def _p(value: float) -> str:
    return "-" if not _known(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else ""


_FILTERS: Mapping[str, Any] = {
    "number": _number,
    "score": _score,
    "difference": _difference,
    "floor": lambda row: row.noise_floor.difference,
    "floor_text": _floor_text,
    "verdict_floor": _verdict_floor,
    "flips": terminal.flips_cell,
    "retained": _retained,
    "spread": _spread,
    "ratio": _ratio,
    "bytes": _bytes,
    "p": _p,
    "times": lambda value: f"{value:.2f}x" if _known(value) else "-",
    "whole": lambda value: f"{math.ceil(value)}" if _known(value) else "-",
    "plain": lambda value: f"{value:.6g}" if _known(value) else "",
    "data_uri": _data_uri,
    "width": lambda picture: _size(picture)[0],
    "height": lambda picture: _size(picture)[1],
}
