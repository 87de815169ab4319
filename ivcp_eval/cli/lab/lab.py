"""Train, evaluate and document the embedded models, and write their benchmarks."""

from __future__ import annotations

import argparse
from importlib import import_module

from ivcp_eval.interface.registry import module_names, unknown

FOREIGN = True  # what follows the task's name belongs to the task
#: Modules of each task by model; the first model is meant where none is named.
TASKS = {
    "train": (
        {"tiny": "tiny.training.train", "tiny2": "tiny2.training.train"},
        "train an embedded model, or what a method reads from a file",
    ),
    "evaluate": ({"tiny": "tiny.evaluate"}, "its held-out accuracy through stock `generate`"),
    "accept": ({"tiny2": "tiny2.evaluate"}, "hold a model to its acceptance table"),
    "build-benchmarks": (
        {
            "tiny": "tiny.build_benchmarks",
            "tiny2": "tiny2.build_benchmarks",
            "clips": "tiny2.clips",
            "rooms": "rooms",
        },
        "write the embedded benchmarks, or check them",
    ),
    "easy-vqa": ({"tiny2": "tiny2.easy_vqa"}, "write easy-VQA's test as a benchmark file"),
    "gpu": ({"all": "gpu"}, "everything that only a GPU can show, in stages of minutes that resume"),
    "choose-layer": ({"tiny": "tiny.choose_layer"}, "accuracy of every cut layer on the validation split"),
    "front": ({"all": "training.front"}, "hold what VisPCO's network learned to the front of `ivcp tune`"),
    "plot-curve": ({"tiny": "tiny.training.plot_curve"}, "plot a training curve"),
}


def part_names() -> tuple[str, ...]:
    """What can be trained beside models, by its file."""
    return module_names("ivcp_eval.lab.training.parts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tasks there are; each has options of its own."""
    parser.usage = "ivcp lab TASK [MODEL] ..."
    tasks = (f"{name} ({', '.join(modules)}): {text}" for name, (modules, text) in TASKS.items())
    parser.epilog = (
        "; ".join(tasks) + f"; trained for a method: {', '.join(part_names())}. `ivcp lab TASK [MODEL] --help`: more"
    )


def run(args: argparse.Namespace) -> int:
    """The task's exit code.

    Raises:
        ValueError: no task, or an unknown one; or a model that the task is not for.
    """
    name, *rest = args.further or [""]
    if name not in TASKS:
        raise ValueError(f"ivcp lab needs a task, got {name!r}; there are {', '.join(TASKS)}")
    if name == "train" and rest and rest[0] in part_names():
        return int(import_module("ivcp_eval.lab.training.command").main(rest))
    modules = TASKS[name][0]
    model = next(iter(modules))
    if rest and rest[0] in {known for each, _ in TASKS.values() for known in each}:
        model, *rest = rest
    if model not in modules:
        raise ValueError(f"ivcp lab {name} is for {', '.join(modules)}, got {model!r}")
    if name == "train" and rest and not rest[0].startswith("-"):
        raise unknown("thing to train", rest[0], [*modules, *part_names()])
    module = import_module(f"ivcp_eval.lab.{modules[model]}")
    return int(module.main(rest) or 0)
