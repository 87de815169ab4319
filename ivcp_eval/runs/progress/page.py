"""A sweep as one HTML file that its workers keep up to date and that a browser reads anew by itself.

Nothing but this file is needed to look at it: no script, no server, no request to any host. Everything in it that
comes from outside (names, reasons, messages of errors) is text, whatever it contains.
"""

from __future__ import annotations

import time
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from ivcp_eval.files import atomic_write, hold_lock, storable
from ivcp_eval.runs.progress.grid import LETTERS, WORDS, trouble, worker
from ivcp_eval.runs.progress.tally import CellState
from ivcp_eval.runs.progress.watch import Watch
from ivcp_eval.runs.progress.words import summary
from ivcp_eval.runs.store.lease import holders

EVERY_S = 10.0
MOST_REASONS = 200

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
$refresh<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$percent % of $name</title>
<style>
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif }
body { margin: 1rem auto; max-width: 80rem; padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: .5rem 0 }
th, td { border: 1px solid #8886; padding: .2rem .5rem; text-align: left; white-space: nowrap }
li { overflow-wrap: anywhere }
progress { width: 100% }
.running { background: #48f4 } .answered { background: #8cf3 } .scored { background: #4a45 }
.failed { background: #f445 } .skipped { background: #8884 }
</style>
</head>
<body>
<h1>$name</h1>
<progress max="$samples" value="$answered">$percent %</progress>
<p>$answered of $samples samples, $summary</p>
<p>As of $now.$next</p>
$grids
<p>$legend</p>
<h2>At work</h2>
$workers
<h2>Failed and left out</h2>
$reasons
</body>
</html>
""")


def render(watch: Watch) -> str:
    """The page as of the watch's last look; it reads itself anew until the sweep is complete and timed."""
    total, cells, busy = watch.total, watch.cells(), holders(watch.plan.state / "leases")
    ended = total.complete and not busy  # times are measured when all is scored
    reasons = [f"{WORDS[c.state]}: {trouble(c)}" for c in cells if c.reason and c.state != "scored"]
    reasons += [f"not here: {problem}" for problem in watch.plan.problems]
    more = [f"and {len(reasons) - MOST_REASONS} more: ivcp sweep status"] if len(reasons) > MOST_REASONS else []
    every = round(EVERY_S)
    return _PAGE.substitute(
        refresh="" if ended else f'<meta http-equiv="refresh" content="{every}">\n',
        next="" if ended else f" Written anew every {every} s while anybody is at work.",
        name=escape(watch.plan.spec.name),
        samples=total.samples,
        answered=total.answered,
        percent=100 * total.answered // max(1, total.samples),
        summary=escape(summary(watch)),
        now=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        grids="\n".join(_grid(model, list(group)) for model, group in groupby(cells, key=lambda cell: cell.model)),
        legend=", ".join(f'<span class="{state}">{LETTERS[state]} {word}</span>' for state, word in WORDS.items()),
        workers=_listed([worker(holder) for holder in busy], "Nobody."),
        reasons=_listed([*reasons[:MOST_REASONS], *more], "Nothing."),
    )


def refresh(watch: Watch, path: Path, every: float = EVERY_S) -> bool:
    """Write the page, unless it was written less than ``every`` seconds ago or another process is at it.

    Returns:
        Whether it was written.

    Raises:
        OSError: it cannot be.
    """
    watch.plan.state.mkdir(parents=True, exist_ok=True)
    with (watch.plan.state / "page.lock").open("a") as lock:
        try:
            hold_lock(lock, path, wait=False)
        except BlockingIOError:
            return False
        # A clock that was set back must not stop the page for long, hence abs.
        if path.exists() and abs(time.time() - path.stat().st_mtime) < every:
            return False
        write(watch, path)
    return True


def write(watch: Watch, path: Path) -> None:
    """The page as of the watch's last look, whole or not at all. Raises OSError."""
    with atomic_write(path) as stream:
        stream.write(storable(render(watch)))


def _grid(model: str, cells: list[CellState]) -> str:
    """One model: a line for each variant, a column for each benchmark."""
    benchmarks = list(dict.fromkeys(cell.benchmark for cell in cells))
    by_place = {(cell.variant, cell.benchmark): cell for cell in cells}
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in benchmarks)
    rows = [
        f'<tr><th scope="row">{escape(variant)}</th>'
        + "".join(_cell(by_place.get((variant, benchmark))) for benchmark in benchmarks)
        + "</tr>"
        for variant in dict.fromkeys(cell.variant for cell in cells)
    ]
    table = f'<table><thead><tr><th scope="col">variant</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<h2>{escape(model)}</h2>\n<div class="wide">{table}</div>'


def _cell(cell: CellState | None) -> str:
    if cell is None:
        return "<td></td>"
    title = escape(f"{WORDS[cell.state]}{': ' if cell.reason else ''}{cell.reason}")
    rows = f"{cell.answered}/{cell.samples}"
    return f'<td class="{cell.state}" title="{title}">{LETTERS[cell.state]} {WORDS[cell.state]} {rows}</td>'


def _listed(texts: list[str], none: str) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>" if texts else f"<p>{none}</p>"
