"""What a sweep has done, is doing and will cost, from its files. No torch beyond what planning needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.terminal import fold
from ivcp_eval.runs.planning import data
from ivcp_eval.runs.planning.plan import RunPlan
from ivcp_eval.runs.planning.uncounted import uncounted_lines
from ivcp_eval.runs.progress.tally import Tally
from ivcp_eval.vlmeval_bridge.judge import EXACT_MATCHING, judge_for

BYTES_PER_ANSWER = 700  # of journal and CSV together
ANSWER_TOKENS = 32  # decoded per sample, for the estimate
PROMPT_TOKENS = 1300  # of one sample: about a megapixel and its question
GPU_FLOPS = 250e12  # that a current GPU reaches in a bfloat16 prefill
GPU_BYTES = 2.5e12  # that it reads per second while decoding
ASSUMED_BYTES = 16e9  # of weights that are not here: 8 billion parameters
JUDGE_TOKENS = (700, 60)  # in and out, per judged answer


def agreement(tallies: list[Tally]) -> str:
    """How many answers made together in half precision equal those made alone; empty where none were compared."""
    compared = sum(line.compared for line in tallies)
    agree = sum(line.agree for line in tallies)
    return f"half precision: {agree} of {compared} answers made together equal those made alone" if compared else ""


def uncounted(plan: RunPlan) -> list[str]:
    """What was answered before under other code or libraries, and what changed since."""
    return uncounted_lines(cell for _, _, cell in plan.cells())


def table(tallies: list[Tally]) -> str:
    """For the terminal."""
    columns = {
        "model": [line.model for line in tallies],
        "benchmark": [line.benchmark for line in tallies],
        "cells done": [f"{line.scored - line.broken}/{line.cells}" for line in tallies],
        "units done": [f"{line.units_done}/{line.units}" for line in tallies],
        "running": [str(line.working) for line in tallies],
        "samples left": [str(line.left) for line in tallies],
        "samples failed": [str(line.failed) for line in tallies],
    }
    return fold(columns, names=("model", "benchmark"))


# -- what it will cost ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """A rough estimate; every constant of it stands at the top of this file.

    Attributes:
        judge_calls: answers that a judge must rate, which cost ``judge_dollars`` (None: price unknown).
        judge_fallbacks: answers that it rates only where no rule can read them; few of them will be.
    """

    gpu_hours: float
    judge_calls: int
    judge_fallbacks: int
    judge_dollars: float | None
    disk_bytes: int


def cost(plan: RunPlan) -> Cost:
    """Of what is not finished yet; what is not on this machine counts with declared sizes and `ASSUMED_BYTES`."""
    variants_of: dict[tuple[str, str], list[Variant]] = {}
    for variant, name in plan.spec.cells:
        variants_of.setdefault((variant.model, name), []).append(variant)
    hours, calls, fallbacks, dollars, disk = 0.0, 0, 0, 0.0, 0
    priced = True
    for (model, name), variants in variants_of.items():
        own = plan.models.get(model)
        benchmark = data.find(name)
        n = benchmark.n_samples or 0
        size: float = ASSUMED_BYTES
        if own is not None:
            size = sum(path.stat().st_size for path in Path(own.weights.source).glob("*.safetensors"))
            if name in own.groups:
                variants = [cell.identity.variant for cell in own.groups[name][1] if cell.finished() is None]
                n = data.rows(benchmark, None)
        n = min(n, plan.options.limit or n)
        if not variants:
            continue
        here = [variant.ratio for variant in variants if variant.server is None]
        hours += n * _seconds(size, here) / 3600 if here else 0.0
        disk += n * len(variants) * BYTES_PER_ANSWER
        judge = judge_for(plan.options.judge, benchmark.judge)
        if judge in ("none", EXACT_MATCHING):
            continue
        if benchmark.judge == "optional":
            fallbacks += n * len(variants)
        else:
            price = _price(judge, plan.options.judge_url)
            calls += n * len(variants)
            dollars += n * len(variants) * (price or 0.0)
            priced &= price is not None
    return Cost(hours, calls, fallbacks, dollars if priced else None, disk)


def _seconds(size: float, ratios: list[float]) -> float:
    """Of one sample in one pass: a trunk to half depth, the other half for each variant, common decoding."""
    prefill = size * PROMPT_TOKENS / GPU_FLOPS  # 2 FLOPs per parameter and token, 2 bytes per parameter
    return prefill * (0.5 + 0.5 * sum(ratios)) * 1.35 + ANSWER_TOKENS * size / GPU_BYTES  # 1.35: the vision tower


def _price(judge: str, url: str) -> float | None:
    """US dollars of one call."""
    from ivcp_eval.vlmeval_bridge.judge.config import JudgeConfig
    from ivcp_eval.vlmeval_bridge.judge.estimate import PRICES

    price = PRICES.get(JudgeConfig(judge, url).snapshot)
    return None if price is None else sum(n * p for n, p in zip(JUDGE_TOKENS, price, strict=True)) / 1e6
