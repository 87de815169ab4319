"""Time pruning beside its FLOP bound, and what sharing one pass gains."""

from __future__ import annotations

import argparse
from importlib import import_module

FOREIGN = True  # what follows belongs to the bench
BENCHES = {
    "pruning": "prefill, decode, selection and memory, pruned against untouched (the default)",
    "selection": "how the cost of choosing grows with the image: slope, kernel launches, share of the prefill",
    "throughput": "requests per second and time to first token under concurrent requests",
    "fork": "many variants in one pass against one by one",
    "stats": "how long a comparison of many variants on many samples takes",
    "eval": "the runner against VLMEvalKit's own loop, one answer after the other",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which bench there is; each has options of its own."""
    parser.usage = "ivcp bench [BENCH] ..."
    parser.epilog = "; ".join(f"{name}: {text}" for name, text in BENCHES.items()) + ". `ivcp bench BENCH --help`: more"


def run(args: argparse.Namespace) -> int:
    """The bench's exit code."""
    rest = list(args.further)
    name = rest.pop(0) if rest and rest[0] in BENCHES else "pruning"
    bench = import_module(f"ivcp_eval.lab.bench.{'scaling' if name == 'selection' else name}")
    return int(bench.main(rest))
