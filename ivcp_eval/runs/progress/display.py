"""Progress of a sweep: bars or a grid on a terminal, plain lines now and then otherwise, and a page if asked for."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ivcp_eval.runs.planning.plan import RunPlan
from ivcp_eval.runs.progress import grid, page
from ivcp_eval.runs.progress.tally import Tally
from ivcp_eval.runs.progress.watch import Watch
from ivcp_eval.runs.progress.words import benchmark_line, failed, kept, summary

if TYPE_CHECKING:
    from ivcp_eval.runs.worker import Hooks

REFRESH_S = 1.0
EVERY_S = 30.0
MOST_BARS = 6  # of benchmarks that are worked on at the same time


class Progress:
    """Shows what all workers of a sweep do, in this process or others, while the block runs.

    Args:
        quiet: show warnings only. every: seconds between two reports where the output is no TTY; 0 leaves them out.
        stream: default standard output.
        page: HTML file that is kept up to date (`page.refresh`), also if quiet; it costs no answer if it cannot be.
        cells: show every cell, redrawn in place; nothing at all where the output is no TTY.
    """

    def __init__(
        self,
        plan: RunPlan,
        quiet: bool = False,
        every: float = EVERY_S,
        stream: Any = None,
        page: Path | None = None,
        cells: bool = False,
    ) -> None:
        self.plan, self.quiet, self.every, self.page, self.cells = plan, quiet, every, page, cells
        self.stream = stream or sys.stdout
        self._watch: Watch | None = None
        self._screen: _Bars | _Grid | _Lines | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._page_failed = False

    def __enter__(self) -> Self:
        terminal = self.stream.isatty()
        reports = not self.quiet and (terminal or (self.every and not self.cells))
        if reports or self.page or self.cells:
            self._watch = Watch(self.plan)
        if reports and terminal and self._watch:
            self._screen = (_Grid if self.cells else _Bars)(self._watch, self.stream)
        elif not self.quiet and not self.cells:
            self._screen = _Lines(self._watch if reports else None, self.stream, self.every)
        if self._watch is not None:
            self._thread = threading.Thread(target=self._follow, args=(self._watch,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if self._watch is not None:
            with suppress(OSError):  # as in `_follow`: to look on must cost nothing of what was done
                self._watch.refresh()
            self._refresh_page(self._watch, every=0)
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
        return self._watch is not None and self._watch.total.complete

    def _follow(self, watch: Watch) -> None:
        while not self._end.wait(REFRESH_S):
            try:
                watch.refresh()
                if self._screen is not None:
                    self._screen.show()
            except OSError:
                continue  # a file system that hiccups; what was missed is read at the next look
            self._refresh_page(watch, page.EVERY_S)

    def _refresh_page(self, watch: Watch, every: float) -> None:
        """A page that cannot be written is said once and costs nothing else."""
        if self.page is None:
            return
        try:
            page.refresh(watch, self.page, every)
        except OSError as error:
            if not self._page_failed:
                self.warn(f"{self.page} is not kept up to date, the work goes on: {error}")
            self._page_failed = True


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
        if last or time.monotonic() - self.spoke >= self.every:
            self.spoke = time.monotonic()
            total = self.watch.total
            working = [benchmark_line(tally) for tally in self.watch.tallies.values() if tally.working]
            self.say("\n  ".join([f"{total.answered}/{total.samples} samples, {summary(self.watch)}", *working]))

    def close(self) -> None:
        self.show(last=True)


class _Grid:
    """Every cell, redrawn in place, as far down as the terminal is high."""

    def __init__(self, watch: Watch, stream: Any) -> None:
        self.watch, self.stream = watch, stream
        self.stream.write("\x1b[2J")
        self.show()

    def say(self, text: str) -> None:
        """Nothing: the next drawing would cover it."""

    def show(self) -> None:
        size = shutil.get_terminal_size()
        lines = grid.lines(self.watch, size.columns)
        if len(lines) >= size.lines:
            hidden = len(lines) - size.lines + 2
            lines = [*lines[:-hidden], f"{hidden} more lines: make the window higher, or --html FILE"[: size.columns]]
        # From the upper left corner, each line up to its end, then what is left of the last drawing.
        self.stream.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self.stream.flush()

    def close(self) -> None:
        self.show()


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
        for key, tally in self.watch.tallies.items():
            if tally.answered == tally.samples and key not in self.reported:
                self.reported.add(key)
                self.say(benchmark_line(tally))
        self._draw(self.bars[0], self.watch.total, self.watch.plan.spec.name, summary(self.watch))
        working = [tally for tally in self.watch.tallies.values() if tally.working][:MOST_BARS]
        while len(self.bars) <= len(working):
            self.bars.append(self._bar(""))
        for bar, tally in zip(self.bars[1:], working, strict=False):
            more = ", ".join(word for word in (failed(tally), kept(tally)) if word)
            self._draw(bar, tally, f"  {tally.model} on {tally.benchmark}", more)
        for bar in self.bars[1 + len(working) :]:
            bar.close()
        del self.bars[1 + len(working) :]

    def close(self) -> None:
        self.show()
        for bar in reversed(self.bars):
            bar.close()
