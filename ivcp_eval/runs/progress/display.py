"""Progress of a sweep on the terminal: bars on a TTY, plain lines now and then otherwise, nothing if quiet."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ivcp_eval.runs.planning.plan import RunPlan
from ivcp_eval.runs.progress.watch import Tally, Watch

if TYPE_CHECKING:
    from ivcp_eval.runs.worker import Hooks

LOOK_S = 1.0
EVERY_S = 30.0
MOST_BARS = 6  # of benchmarks that are worked on at the same time


class Progress:
    """Shows what all workers of a sweep do, in this process or others, while the block runs.

    Args:
        quiet: show warnings only. every: seconds between two reports where the output is no TTY; 0 leaves them out.
        stream: default standard output.
    """

    def __init__(self, plan: RunPlan, quiet: bool = False, every: float = EVERY_S, stream: Any = None) -> None:
        self.plan, self.quiet, self.every = plan, quiet, every
        self.stream = stream or sys.stdout
        self._screen: _Bars | _Lines | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.quiet:
            return self
        if self.stream.isatty():
            self._screen = _Bars(Watch(self.plan), self.stream)
        else:
            self._screen = _Lines(Watch(self.plan) if self.every else None, self.stream, self.every)
        if self._screen.watch is not None:
            self._thread = threading.Thread(target=self._follow, args=(self._screen,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if self._screen is not None:
            self._screen.close()

    @property
    def hooks(self) -> Hooks:
        """What to hand to a worker in this process."""
        from ivcp_eval.runs.worker import Hooks  # and with it all that answers: looking on needs none of it

        return Hooks(self.say, self.warn)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._screen is not None:
            self._screen.say(text)

    def warn(self, text: str) -> None:
        """A line that is shown even if the rest is not."""
        if self._screen is not None:
            self._screen.say(text)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    @property
    def complete(self) -> bool:
        """Nothing is left to answer or score."""
        return self._screen is not None and self._screen.watch is not None and self._screen.watch.total.complete

    def _follow(self, screen: _Bars | _Lines) -> None:
        while not self._end.wait(LOOK_S):
            try:
                screen.show()
            except OSError:
                continue  # a file system that hiccups; what was missed is read at the next look


def summary(watch: Watch) -> str:
    """How fast, how long still, what is kept, and who is at work."""
    total, eta = watch.total, watch.eta_s
    words = [f"{watch.rate:.2f} samples/s" if watch.rate else ""]
    words += [f"{duration(eta)} left" if eta is not None and total.answered < total.samples else ""]
    words += [_kept(total), _failed(total), f"{total.scored}/{total.cells} cells scored"]
    words += [f"{total.broken} of them not whole" if total.broken else "", f"{total.working} at work"]
    return ", ".join(word for word in words if word)


def benchmark_line(tally: Tally) -> str:
    """How far one benchmark of one model is."""
    words = [f"{tally.answered}/{tally.samples} samples", _failed(tally), _kept(tally)]
    return f"{tally.model} on {tally.benchmark}: " + ", ".join(word for word in words if word)


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _kept(tally: Tally) -> str:
    return "" if tally.kept is None else f"{100 * tally.kept:.0f}% of visual tokens kept"


def _failed(tally: Tally) -> str:
    return f"{tally.failed} failed" if tally.failed else ""


class _Lines:
    """A paragraph every so often, for logs and pipes."""

    def __init__(self, watch: Watch | None, stream: Any, every: float) -> None:
        self.watch, self.stream, self.every = watch, stream, every
        self.spoke = time.monotonic()

    def say(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()

    def show(self, last: bool = False) -> None:
        if self.watch is None:
            return
        self.watch.look()
        if last or time.monotonic() - self.spoke >= self.every:
            self.spoke = time.monotonic()
            total = self.watch.total
            working = [benchmark_line(tally) for tally in self.watch.tallies.values() if tally.working]
            self.say("\n  ".join([f"{total.answered}/{total.samples} samples, {summary(self.watch)}", *working]))

    def close(self) -> None:
        self.show(last=True)


class _Bars:
    """One bar for the whole sweep, and under it one for each benchmark that is worked on."""

    def __init__(self, watch: Watch, stream: Any) -> None:
        from tqdm import tqdm

        self.watch, self.stream, self.tqdm = watch, stream, tqdm
        self.reported = {key for key, tally in watch.tallies.items() if tally.answered == tally.samples}
        self.bars = [self._bar(watch.plan.spec.name)]
        self._draw(self.bars[0], watch.total, watch.plan.spec.name, summary(watch))

    def _bar(self, text: str) -> Any:
        # Speed and time left are the watch's: tqdm would count what was there before as speed.
        shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        top = not getattr(self, "bars", None)
        return self.tqdm(
            total=1, desc=text, bar_format=shape, file=self.stream, dynamic_ncols=True, leave=top, mininterval=0
        )

    def _draw(self, bar: Any, tally: Tally, text: str, more: str) -> None:
        bar.total, bar.n = tally.samples, tally.answered
        bar.set_description_str(text, refresh=False)
        bar.set_postfix_str(more, refresh=False)
        bar.refresh()

    def say(self, text: str) -> None:
        self.tqdm.write(text, file=self.stream)

    def show(self) -> None:
        self.watch.look()
        for key, tally in self.watch.tallies.items():
            if tally.answered == tally.samples and key not in self.reported:
                self.reported.add(key)
                self.say(benchmark_line(tally))
        self._draw(self.bars[0], self.watch.total, self.watch.plan.spec.name, summary(self.watch))
        working = [tally for tally in self.watch.tallies.values() if tally.working][:MOST_BARS]
        while len(self.bars) <= len(working):
            self.bars.append(self._bar(""))
        for bar, tally in zip(self.bars[1:], working, strict=False):
            more = ", ".join(word for word in (_failed(tally), _kept(tally)) if word)
            self._draw(bar, tally, f"  {tally.model} on {tally.benchmark}", more)
        for bar in self.bars[1 + len(working) :]:
            bar.close()
        del self.bars[1 + len(working) :]

    def close(self) -> None:
        self.show()
        for bar in reversed(self.bars):
            bar.close()
