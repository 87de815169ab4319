"""How far a sweep is, in words: the same ones on a terminal, in a log and on a page."""

from __future__ import annotations

from ivcp_eval.runs.progress.tally import Tally
from ivcp_eval.runs.progress.watch import Watch


def summary(watch: Watch) -> str:
    """How fast, how long still, what is kept, and who is at work."""
    total, eta = watch.total, watch.eta_s
    words = [f"{watch.rate:.2f} samples/s" if watch.rate else ""]
    words += [f"{duration(eta)} left" if eta is not None and total.answered < total.samples else ""]
    words += [kept(total), failed(total), f"{total.scored}/{total.cells} cells scored"]
    words += [f"{total.broken} of them not whole" if total.broken else "", f"{total.working} at work"]
    return ", ".join(word for word in words if word)


def benchmark_line(tally: Tally) -> str:
    """How far one benchmark of one model is."""
    words = [f"{tally.answered}/{tally.samples} samples", failed(tally), kept(tally)]
    return f"{tally.model} on {tally.benchmark}: " + ", ".join(word for word in words if word)


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def kept(tally: Tally) -> str:
    """Share of the visual tokens; empty before the first pruned answer."""
    return "" if tally.kept is None else f"{100 * tally.kept:.0f}% of visual tokens kept"


def failed(tally: Tally) -> str:
    """How many samples; empty for none."""
    return f"{tally.failed} failed" if tally.failed else ""
