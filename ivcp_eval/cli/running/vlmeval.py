"""VLMEvalKit's own runner, our models and benchmarks registered."""

from __future__ import annotations

import argparse

FOREIGN = True  # what follows the verb is VLMEvalKit's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options are those of ``python -m vlmeval.run``."""
    parser.epilog = "Every option is handed on: ivcp vlmeval --data POPE --model qwen25__ivc_prune__r0.5"


def run(args: argparse.Namespace) -> int:
    """The runner's exit code."""
    from ivcp_eval import vlmeval_bridge
    from ivcp_eval.runs.answering.live import from_variant_name

    return vlmeval_bridge.run_vlmeval(args.further, from_variant_name)
