"""What a request comes to on this machine: weights, data, limits, and a hashed cell per variant and benchmark.

Knows no method and no family by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import Benchmark, DataMissing
from ivcp_eval.engine.cost.predicted import Decoder, hold
from ivcp_eval.files import file_digest
from ivcp_eval.interface import models
from ivcp_eval.interface.registry import adapter, make_method, method_source, parameters_of, unknown
from ivcp_eval.interface.variants import BASELINE, Variant
from ivcp_eval.runs.planning import cells
from ivcp_eval.runs.planning.cells import Cell, Identity
from ivcp_eval.vlmeval_bridge.judge import EXACT_MATCHING, Judge, JudgeConfig, asked_judge, cache_folder

if TYPE_CHECKING:
    from ivcp_eval.runs.answering.placement import Limits, Placement


@dataclass(frozen=True)
class Request:
    """What a user asked for.

    Attributes:
        variant: the pruned variant; its unpruned baseline runs too.
        data: benchmark names or a group; empty takes the shipped sets for a shipped model, else the matrix.
        model_path: local weights. limit: first rows of each benchmark only.
        judge: model that rates; empty takes the default where a benchmark needs one, and exact matching elsewhere.
        judge_url: its endpoint; empty takes ``$OPENAI_BASE_URL``, else OpenAI's.
        device, dtype, attention: empty to find. min_pixels, max_pixels, max_new_tokens: None for the published ones.
        exact: answers made together with others in half precision do not count (`cells.Cell`).
        timeout: seconds that one answer may take, None for no limit; what did not come in time is an error, so the
            value is noted but is no part of a cell's identity.
        runs: where cells live. output: the CSV; None puts it beside the cells.
        timing: False leaves all times and dates out, so that equal runs are equal bytes.
        elsewhere: nothing is answered on this machine, so it need not have the device; that of a full-size model is
            then CUDA unless said otherwise.
    """

    variant: Variant
    data: tuple[str, ...] = ()
    model_path: str | None = None
    limit: int | None = None
    judge: str = ""
    judge_url: str = ""
    device: str = ""
    dtype: str = ""
    attention: str = ""
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_new_tokens: int | None = None
    trust_remote_code: bool = False
    exact: bool = False
    timeout: float | None = None
    runs: Path = cells.RUNS
    output: Path | None = None
    timing: bool = True
    elsewhere: bool = False


@dataclass(frozen=True)
class Plan:
    """What a request comes to on this machine; a cell for each variant and benchmark whose data is here."""

    weights: models.Weights
    placement: Placement
    limits: Limits
    cells: list[tuple[Benchmark, Cell]]
    missing: list[str] = field(default_factory=list)


def make_plan(request: Request, variants: Sequence[Variant] | None = None) -> Plan:
    """Find weights and data, and hash every cell; raises as `evaluate`.

    Args:
        variants: of the request's model, in place of the request's own and its baseline.
    """
    import torch

    from ivcp_eval.runs.answering.placement import Limits, Placement

    weights = models.locate(request.variant.model, request.model_path)
    device = request.device or ("cuda" if request.elsewhere and not weights.checkpoint.local else "")
    try:
        torch.device("cuda" if device == "auto" else device or "cpu")
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; use cuda, cuda:1, cpu, or auto for all GPUs") from None
    placement = Placement(device, request.dtype, request.attention).resolve(here=not request.elsewhere)
    if placement.device == "cpu" and not device and not weights.checkpoint.local:
        raise ValueError(
            f"no CUDA device was found and {weights.checkpoint.name} is a full-size model. Run on a GPU machine, or "
            "pass DEVICE=cpu (--device cpu) to wait for it here."
        )
    published = Limits.published(weights)
    limits = Limits(
        published.min_pixels if request.min_pixels is None else request.min_pixels,
        published.max_pixels if request.max_pixels is None else request.max_pixels,
        request.max_new_tokens or published.max_new_tokens,
    )
    if (limits.min_pixels or 0) > (limits.max_pixels or float("inf")):
        raise ValueError(
            f"min_pixels {limits.min_pixels} is above max_pixels {limits.max_pixels} (of {weights.family}, where not "
            "given): lower the first or raise the second"
        )
    if variants is None:
        own = request.variant
        variants = [own.baseline] if own.method == BASELINE else [own.baseline, own]
    tuned = [v.with_parameters({**weights.checkpoint.methods.get(v.method, {}), **v.parameters}) for v in variants]
    if any(variant.budget for variant in tuned):
        decoder = Decoder.of(weights)
        tuned = [hold(variant, decoder) for variant in tuned]
    found: list[tuple[Benchmark, Cell]] = []
    missing = []
    for benchmark in _benchmarks(request, weights):
        try:
            data = _data_digest(benchmark)
        except DataMissing as error:
            missing.append(str(error))
            continue
        found += [(benchmark, _cell(request, weights, placement, limits, benchmark, data, v)) for v in tuned]
    if not found:
        raise DataMissing("\n".join(missing))
    return Plan(weights, placement, limits, found, missing)


def _benchmarks(request: Request, weights: models.Weights) -> list[Benchmark]:
    groups = benchmarks.groups()
    asked = request.data or ("embedded" if weights.checkpoint.local else "matrix",)
    members = [member for name in asked for member in groups.get(name, (name,))]
    return [_benchmark(member) for member in dict.fromkeys(members)]


def _benchmark(name: str) -> Benchmark:
    if name in benchmarks.names():
        return benchmarks.load(name)
    from ivcp_eval.vlmeval_bridge import knows

    if knows(name):
        return benchmarks.undeclared(name)
    raise unknown("benchmark or group", name, [*benchmarks.names(), *benchmarks.groups()])


def _data_digest(benchmark: Benchmark) -> str:
    """SHA-256 of the benchmark's file; fetches it through VLMEvalKit where it is not here yet."""
    from ivcp_eval.vlmeval_bridge.environment import data_root

    path = benchmark.path or data_root() / f"{benchmark.vlmeval}.tsv"
    if not path.is_file():
        _fetch(benchmark)
    digest = file_digest(path)
    if benchmark.sha256 and digest != benchmark.sha256:
        raise ValueError(
            f"{path.name} has checksum {digest[:12]}..., its data file says {benchmark.sha256[:12]}...: the file was "
            "changed or cut short. Restore it (git checkout), or correct sha256 if the change is meant."
        )
    return digest


def _fetch(benchmark: Benchmark) -> None:
    from ivcp_eval.vlmeval_bridge import register

    register()
    from ivcp_eval.vlmeval_bridge.evaluate import build  # not before VLMEvalKit was imported as `register` does it

    build(benchmark, None)


def _cell(
    request: Request,
    weights: models.Weights,
    placement: Placement,
    limits: Limits,
    benchmark: Benchmark,
    data: str,
    variant: Variant,
) -> Cell:
    method = make_method(variant.method, variant.parameters)
    identity = Identity(
        variant=variant,
        method_parameters=parameters_of(method),
        weights=weights.revision,
        benchmark=benchmark.name,
        data=data,
        scoring=benchmark.scoring,
        limit=request.limit,
        prompt=_prompt_digest(weights.family, benchmark),
        judge=_judge_name(request, benchmark),
        limits=dataclasses.asdict(limits),
        placement={**dataclasses.asdict(placement), "device": placement.device.partition(":")[0]},
        versions=cells.versions(),
        code=cells.code_hash(),
        method_source=method_source(variant.method),
    )
    return Cell(identity, request.runs, request.exact)


def _judge_config(request: Request, benchmark: Benchmark) -> JudgeConfig | None:
    asked = asked_judge(request.judge, benchmark.judge)
    return None if asked in ("none", EXACT_MATCHING) else JudgeConfig(asked, request.judge_url)


def _judge_name(request: Request, benchmark: Benchmark) -> str:
    config = _judge_config(request, benchmark)
    return config.identity if config else asked_judge(request.judge, benchmark.judge)


def judges_for(request: Request, pending: Sequence[tuple[Benchmark, Cell]]) -> dict[str, Judge]:
    """One judge per identity, so that each is probed once and shares its connections."""
    folder = cache_folder(request.runs)
    configs = [config for benchmark, _ in pending if (config := _judge_config(request, benchmark))]
    return {config.identity: Judge(config, folder) for config in configs}


def _prompt_digest(family: str, benchmark: Benchmark) -> str:
    """SHA-256 of the wording: the family's template for the benchmark's kind, or the benchmark's own."""
    wording = None
    if benchmark.kind and benchmark.prompt == "family":
        wording = adapter(family).prompt(benchmark.kind, "{question}", {"A": "{A}", "B": "{B}"}, "{hint}")
    return hashlib.sha256((wording or f"dataset:{benchmark.vlmeval}").encode()).hexdigest()
