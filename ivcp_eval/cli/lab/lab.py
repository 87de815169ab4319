"""Train, evaluate and document the embedded model, and write its benchmarks."""

from __future__ import annotations

import argparse
from importlib import import_module

FOREIGN = True  # what follows the task's name belongs to the task
TASKS = {
    "train": ("tiny.training.train", "train the embedded model"),
    "evaluate": ("tiny.evaluate", "its held-out accuracy through stock `generate`"),
    "build-benchmarks": ("tiny.build_benchmarks", "write the embedded benchmarks, or check them"),
    "choose-layer": ("tiny.training.choose_layer", "accuracy of every cut layer on the validation split"),
    "plot-curve": ("tiny.training.plot_curve", "plot a training curve"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tasks there are; each has options of its own."""
    parser.usage = "ivcp lab TASK ..."
    parser.epilog = "; ".join(f"{name}: {text}" for name, (_, text) in TASKS.items()) + ". `ivcp lab TASK --help`: more"


def run(args: argparse.Namespace) -> int:
    """The task's exit code.

    Raises:
        ValueError: no task, or an unknown one.
    """
    name, *rest = args.further or [""]
    if name not in TASKS:
        raise ValueError(f"ivcp lab needs a task, got {name!r}; there are {', '.join(TASKS)}")
    module = import_module(f"ivcp_eval.lab.{TASKS[name][0]}")
    return int(module.main(rest) or 0)
