"""Every cell of a sweep in a few lines of a terminal: a letter for each variant, a line for each benchmark."""

from __future__ import annotations

import textwrap
from itertools import groupby

from ivcp_eval.runs.progress.tally import CellState, State
from ivcp_eval.runs.progress.watch import Watch
from ivcp_eval.runs.progress.words import duration, summary
from ivcp_eval.runs.store.lease import Holder, holders

LETTERS: dict[State, str] = {
    "waiting": ".",
    "running": ">",
    "answered": "=",
    "scored": "#",
    "failed": "X",
    "skipped": "-",
}
WORDS: dict[State, str] = {
    "waiting": "waiting",
    "running": "running",
    "answered": "answered",
    "scored": "scored",
    "failed": "failed",
    "skipped": "cannot run",
}


def lines(watch: Watch, width: int) -> list[str]:
    """The view as of the last look; none of its lines is longer than ``width`` characters."""
    cells, total = watch.cells(), watch.total
    name = watch.plan.spec.name
    found = [f"{name}: {total.answered}/{total.samples} samples, {summary(watch)}"]
    for (model, benchmark), group in groupby(cells, key=lambda cell: (cell.model, cell.benchmark)):
        tally = watch.tallies[model, benchmark]
        letters = "".join(LETTERS[cell.state] for cell in group)
        found.append(f"{model} on {benchmark}: {tally.answered}/{tally.samples}  {letters}")
    found.append("  ".join(f"{letter} {WORDS[state]}" for state, letter in LETTERS.items()))
    found += [f"at work: {worker(holder)}" for holder in holders(watch.plan.state / "leases")]
    found += [f"{WORDS[cell.state]}: {trouble(cell)}" for cell in cells if cell.reason and cell.state != "scored"]
    found += [f"not here: {problem}" for problem in watch.plan.problems]
    return [part for line in found for part in textwrap.wrap(_plain(line), width, subsequent_indent="  ")]


def trouble(cell: CellState) -> str:
    """What went wrong in a cell."""
    return f"{cell.model} on {cell.benchmark}: {cell.variant}: {cell.reason}"


def worker(holder: Holder) -> str:
    """Who it is, what it does, for how long, and whether it lives."""
    since = "" if holder.held_s is None else f" for {duration(holder.held_s)}"
    return f"{holder.who} at {holder.claim}{since}, last sign of life {duration(holder.silent_s)} ago"


def _plain(text: str) -> str:
    """Without what would move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else " " for c in text)
