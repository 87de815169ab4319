"""Progress on the terminal: bars on a TTY, a plain line now and then elsewhere, nothing if asked for."""

from __future__ import annotations

import sys
import time
from typing import Any

from ivcp_eval.sweep.plan import SweepPlan, Unit
from ivcp_eval.sweep.work import Hooks, mark

EVERY_S = 30.0


class Progress:
    """Counts answered samples, overall and per benchmark."""

    def __init__(self, plan: SweepPlan, quiet: bool, stream: Any = None) -> None:
        self.stream = stream or sys.stdout
        self.quiet = quiet
        self.total = self.done = self.now = 0
        self.left: dict[tuple[str, str], list[int]] = {}
        for unit in plan.units():
            n = unit.stop - unit.start
            self.total += n
            counted = self.left.setdefault((unit.model, unit.benchmark.name), [0, 0])
            counted[1] += n
            if mark(plan, unit).exists() or not unit.pending:
                self.done += n
                counted[0] += n
        self.kept: list[float] = []
        self.start = self.spoke = time.monotonic()
        self.bar: Any = None
        if not quiet and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, initial=self.done, unit="sample", file=self.stream, dynamic_ncols=True)

    @property
    def hooks(self) -> Hooks:
        """What to hand to a worker."""
        return Hooks(self.say, self.sample)

    def say(self, text: str) -> None:
        """A line."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def sample(self, unit: Unit, n: int, kept: float | None) -> None:
        """``n`` more samples; ``kept`` is the mean share of visual tokens over the variants."""
        self.done, self.now = self.done + n, self.now + n
        self.left[unit.model, unit.benchmark.name][0] += n
        if kept is not None:
            self.kept.append(kept)
        if self.bar is not None:
            self.bar.set_description(f"{unit.model} {unit.benchmark.name}")
            self.bar.set_postfix_str(self._kept())
            self.bar.update(n)
        elif time.monotonic() - self.spoke > EVERY_S:
            self.spoke = time.monotonic()
            self.say(self.line(unit))

    def line(self, unit: Unit) -> str:
        """Overall and of one benchmark: how far, how fast, how long still, what is kept."""
        done, total = self.left[unit.model, unit.benchmark.name]
        rate = self.now / max(1e-9, time.monotonic() - self.start)
        rest = (self.total - self.done) / rate if rate else 0.0
        return (
            f"{self.done}/{self.total} samples ({unit.model} on {unit.benchmark.name}: {done}/{total}), "
            f"{rate:.2f} samples/s, {rest / 60:.0f} min left, {self._kept()}"
        )

    def _kept(self) -> str:
        recent = self.kept[-200:]
        return f"{100 * sum(recent) / len(recent):.0f}% tokens kept" if recent else ""

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
