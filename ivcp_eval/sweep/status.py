"""What a sweep has done, is doing and will cost, from its files. No torch beyond what planning needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ivcp_eval.judge import asked_judge
from ivcp_eval.sweep.lease import held
from ivcp_eval.sweep.plan import ModelPlan, SweepPlan, Unit, rows
from ivcp_eval.sweep.work import lease, mark

BYTES_PER_ANSWER = 700  # of journal and CSV together
ANSWER_TOKENS = 32  # decoded per sample, for the estimate
PROMPT_TOKENS = 1300  # of one sample: about a megapixel and its question
GPU_FLOPS = 250e12  # that a current GPU reaches in a bfloat16 prefill
GPU_BYTES = 2.5e12  # that it reads per second while decoding
JUDGE_TOKENS = (700, 60)  # in and out, per judged answer


@dataclass
class Line:
    """One benchmark of one model."""

    model: str
    benchmark: str
    cells: int = 0
    finished: int = 0
    units: int = 0
    answered: int = 0
    running: int = 0
    samples: int = 0
    left: int = 0
    failed: int = 0
    seconds: float = 0.0
    timed: int = 0
    reasons: list[str] = field(default_factory=list)


def lines(plan: SweepPlan) -> list[Line]:
    """The state of every benchmark of every model."""
    found: dict[tuple[str, str], Line] = {}
    for _, benchmark, cell in plan.scored():
        line = found.setdefault(
            (cell.identity.variant.model, benchmark.name), Line(cell.identity.variant.model, benchmark.name)
        )
        line.cells += 1
        if cell.finished() is not None:
            line.finished += 1
        elif cell.record.is_file():
            line.reasons.append(
                f"{cell.identity.variant.name}: {json.loads(cell.record.read_text(encoding='utf-8'))['reason']}"
            )
    for unit in plan.units():
        _count(plan, unit, found[unit.model, unit.benchmark.name])
    return list(found.values())


def _count(plan: SweepPlan, unit: Unit, line: Line) -> None:
    n = unit.stop - unit.start
    line.units += 1
    line.samples += n
    path = mark(plan, unit)
    if path.is_file():
        noted = json.loads(path.read_text(encoding="utf-8"))
        line.answered += 1
        line.failed += noted["failed"]
        line.seconds, line.timed = line.seconds + noted["seconds"], line.timed + noted["answered"]
    elif not unit.pending:
        line.answered += 1
    else:
        line.left += n
        line.running += held(lease(plan, unit.name))


def eta_hours(found: list[Line]) -> float | None:
    """Hours until the last answer at the speed and with the workers of now; None before anything was timed."""
    timed = sum(line.timed for line in found)
    if not timed:
        return None
    seconds = sum(line.seconds for line in found) / timed * sum(line.left for line in found)
    return seconds / max(1, sum(line.running for line in found)) / 3600


def table(found: list[Line]) -> str:
    """For the terminal."""
    from tabulate import tabulate

    header = ("model", "benchmark", "cells done", "units done", "running", "samples left", "samples failed")
    body = [
        (
            li.model,
            li.benchmark,
            f"{li.finished}/{li.cells}",
            f"{li.answered}/{li.units}",
            li.running,
            li.left,
            li.failed,
        )
        for li in found
    ]
    return str(tabulate(body, header))


# -- what it will cost ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """A rough estimate; every constant of it stands at the top of this file."""

    gpu_hours: float | None
    judge_calls: int
    judge_dollars: float | None
    disk_bytes: int


def cost(plan: SweepPlan) -> Cost:
    """Of what is not finished yet. GPU hours are None where no weights are here to be weighed."""
    hours: float | None = 0.0
    calls, dollars, disk = 0, 0.0, 0
    priced = True
    for model in plan.models.values():
        size = sum(path.stat().st_size for path in Path(model.weights.source).glob("*.safetensors"))
        for benchmark, group in model.groups.values():
            pending = [cell for cell in group if cell.finished() is None]
            n = rows(benchmark, model.request.limit)
            disk += n * len(pending) * BYTES_PER_ANSWER
            if pending and hours is not None:
                hours = (
                    hours + n * _seconds(size, [cell.identity.variant.ratio for cell in pending]) / 3600
                    if size
                    else None
                )
            if pending and _judged(model, benchmark.judge):
                calls += n * len(pending)
                price = _price(model, benchmark.judge)
                priced &= price is not None
                dollars += n * len(pending) * (price or 0.0)
    return Cost(hours if plan.models else None, calls, dollars if priced else None, disk)


def _seconds(size: int, ratios: list[float]) -> float:
    """Of one sample in one pass: a trunk to half depth, the other half for each variant, common decoding."""
    prefill = size * PROMPT_TOKENS / GPU_FLOPS  # 2 FLOPs per parameter and token, 2 bytes per parameter
    return prefill * (0.5 + 0.5 * sum(ratios)) * 1.35 + ANSWER_TOKENS * size / GPU_BYTES  # 1.35: the vision tower


def _judged(model: ModelPlan, need: str) -> bool:
    return need == "required" or (
        need == "optional" and asked_judge(model.request.judge, need) not in ("none", "exact_matching")
    )


def _price(model: ModelPlan, need: str) -> float | None:
    from ivcp_eval.judge.config import JudgeConfig
    from ivcp_eval.judge.estimate import PRICES

    price = PRICES.get(JudgeConfig(asked_judge(model.request.judge, need), model.request.judge_url).snapshot)
    return None if price is None else sum(n * p for n, p in zip(JUDGE_TOKENS, price, strict=True)) / 1e6
