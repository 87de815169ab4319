"""Plot a training curve: ``ivcp lab plot-curve CSV PNG`` (needs matplotlib)."""

from __future__ import annotations

import argparse
import csv
from itertools import pairwise
from pathlib import Path

GROUPS = (
    ("Grounding, IoU >= 0.5", "grounding_"),
    ("Multiple choice", "mcq_"),
    ("Yes/no", "yes_no_"),
    ("Short answer", "short_"),
)


def plot(source: Path, target: Path) -> None:
    """Draw the accuracies in ``source`` over the images seen, one panel per task; dashed lines part the phases."""
    from matplotlib.figure import Figure

    with source.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (title, prefix) in zip(figure.subplots(2, 2, sharex=True).flat, GROUPS, strict=True):
        for column in (c for c in rows[0] if c.startswith(prefix)):
            points = [(int(row["images"]), 100 * float(row[column])) for row in rows if row[column]]
            axis.plot(*zip(*points, strict=True), marker=".", label=column.removeprefix(prefix))
        for before, after in pairwise(rows):
            if before["phase"] != after["phase"]:
                axis.axvline(int(before["images"]), color="grey", linestyle="--", linewidth=0.8)
        axis.set(title=title, ylim=(0, 102), xlabel="images", ylabel="% right (teacher-forced, validation)")
        axis.legend(fontsize="small")
    figure.savefig(target, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="ivcp lab plot-curve", description="Plot the tiny model's training curve.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args(argv)
    plot(arguments.source, arguments.target)
