"""Runs a model unpruned and pruned on benchmarks: plan the cells, reuse what is finished, run the rest, write the CSV.

Knows no method and no family by name.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ivcp_eval
from ivcp_eval import benchmarks, cells, locations, models
from ivcp_eval.accounting import Decoder, described, hold
from ivcp_eval.benchmarks import Benchmark, DataMissing
from ivcp_eval.cells import Cell, Identity
from ivcp_eval.files import file_digest, write_json
from ivcp_eval.journal import Journal
from ivcp_eval.judge import EXACT_MATCHING, Judge, JudgeConfig, asked_judge, cache_folder
from ivcp_eval.registry import adapter, make_method, method_source
from ivcp_eval.results import write_results, write_samples
from ivcp_eval.variants import BASELINE, PROMPT, Variant

if TYPE_CHECKING:
    from ivcp_eval.session import Limits, Placement
    from ivcp_eval.vlmeval_bridge.evaluate import Scored
    from ivcp_eval.vlmeval_bridge.model import PrunedVLM


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


@dataclass
class Outcome:
    """What came of a request.

    Attributes:
        csv: the results file. reused, computed: finished cells found and made. problems: one line for each cell that
            is not whole; empty means success.
    """

    csv: Path
    reused: int = 0
    computed: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a request comes to on this machine; a cell for each variant and benchmark whose data is here."""

    weights: models.Weights
    placement: Placement
    limits: Limits
    cells: list[tuple[Benchmark, Cell]]
    missing: list[str] = field(default_factory=list)


def evaluate(request: Request, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Run (or reuse) every cell of a request and write its CSV.

    Raises:
        ValueError: an unknown name or a bad parameter. MissingWeights, DataMissing: with how to get them.
        RuntimeError: another process evaluates the same cell. DiskFullError: nothing half-written is left.
    """
    plan = make_plan(request)
    for budgeted in {cell.identity.variant.name: cell.identity.variant for _, cell in plan.cells}.values():
        if budgeted.budget is not None:
            if budgeted.budget.problem:
                raise ValueError(budgeted.budget.problem)
            say(described(budgeted))
    pending = [(benchmark, cell) for benchmark, cell in plan.cells if cell.finished() is None]
    outcome = Outcome(csv=request.output or _output(request), reused=len(plan.cells) - len(pending))
    outcome.problems += plan.missing
    if outcome.reused:
        say(f"reusing {outcome.reused} finished of {len(plan.cells)} cells (a cell is one variant on one benchmark)")
    if pending:
        _run_pending(request, plan, pending, outcome, say)
    rows = [row for benchmark, cell in plan.cells for row in cell_rows(plan.weights, benchmark, cell, outcome.csv)]
    outcome.csv.parent.mkdir(parents=True, exist_ok=True)
    write_results(outcome.csv, rows)
    return outcome


# -- plan -----------------------------------------------------------------------------------------------------------


def make_plan(request: Request, variants: Sequence[Variant] | None = None) -> Plan:
    """Find weights and data, and hash every cell; raises as `evaluate`.

    Args:
        variants: of the request's model, in place of the request's own and its baseline.
    """
    from ivcp_eval.session import Limits, Placement

    weights = models.locate(request.variant.model, request.model_path)
    asked = Placement(request.device, request.dtype, request.attention)
    placement = asked.resolve()
    if placement.device == "cpu" and not request.device and not weights.checkpoint.local:
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
    groups = {benchmarks.load(name).group for name in benchmarks.names()}
    asked = request.data or ("embedded" if weights.checkpoint.local else "matrix",)
    found: list[Benchmark] = []
    for name in asked:
        if name in groups:
            found += [benchmarks.load(member) for member in benchmarks.names(name)]
        else:
            found.append(_benchmark(name))
    if not found:
        raise ValueError(f"no benchmark is declared in group {asked[0]!r}; name some with DATA= (--data)")
    return list({benchmark.name: benchmark for benchmark in found}.values())


def _benchmark(name: str) -> Benchmark:
    try:
        return benchmarks.load(name)
    except ValueError:
        from ivcp_eval.vlmeval_bridge import knows

        if knows(name):
            return benchmarks.undeclared(name)
        raise


def _data_digest(benchmark: Benchmark) -> str:
    """SHA-256 of the benchmark's file; fetches it through VLMEvalKit where it is not here yet."""
    from ivcp_eval.vlmeval_bridge.environment import data_root, import_vlmeval

    path = benchmark.path or data_root() / f"{benchmark.vlmeval}.tsv"
    if not path.is_file():
        import_vlmeval()
        from ivcp_eval.vlmeval_bridge import register
        from ivcp_eval.vlmeval_bridge.evaluate import build

        register()
        build(benchmark, None)
    digest = file_digest(path)
    if benchmark.sha256 and digest != benchmark.sha256:
        raise ValueError(
            f"{path.name} has checksum {digest[:12]}..., its data file says {benchmark.sha256[:12]}...: the file was "
            "changed or cut short. Restore it (git checkout), or correct sha256 if the change is meant."
        )
    return digest


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
        method_parameters=dataclasses.asdict(method),  # type: ignore[call-overload]
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


def _output(request: Request) -> Path:
    name, budget = request.variant.name, request.variant.budget
    unnamed = dict(request.variant.parameters)
    if budget is not None and budget.prompt not in (None, PROMPT):
        unnamed["budget_prompt"] = budget.prompt
    if unnamed:
        text = json.dumps(unnamed, sort_keys=True, default=str)
        name += "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return request.runs.parent / "eval" / f"{name}.csv"


# -- run ------------------------------------------------------------------------------------------------------------


def _run_pending(
    request: Request,
    plan: Plan,
    pending: Sequence[tuple[Benchmark, Cell]],
    outcome: Outcome,
    say: Callable[[str], None],
) -> None:
    from ivcp_eval.vlmeval_bridge import register

    register()
    from ivcp_eval.session import timed_load
    from ivcp_eval.vlmeval_bridge.model import PrunedVLM

    session, seconds = timed_load(plan.weights, plan.placement, plan.limits, request.trust_remote_code, request.timeout)
    place = plan.placement
    say(f"loaded {request.variant.model} in {seconds:.1f} s ({place.dtype}, {place.attention}, {place.device})")
    for _, cell in pending:
        session.check(cell.identity.variant)
    judges = judges_for(request, pending)
    for number, (benchmark, cell) in enumerate(pending, 1):
        say(f"[{number}/{len(pending)}] {cell.identity.variant.name} on {benchmark.name}")
        answers = partial(PrunedVLM, session, cell.identity.variant)
        record = run_cell(request, answers, benchmark, cell, judges.get(cell.identity.judge))
        if record["status"] == "ok":
            outcome.computed += 1
        else:
            outcome.problems.append(f"{cell.identity.variant.name} on {benchmark.name}: {record['reason']}")


def run_cell(
    request: Request,
    answers: Callable[[Journal], PrunedVLM],
    benchmark: Benchmark,
    cell: Cell,
    judge: Judge | None,
) -> dict[str, Any]:
    """Answer what the cell's journal lacks, score, and write the cell's files; returns the content of ``run.json``.

    Args:
        answers: makes the model that VLMEvalKit asks, from the open journal.
    """
    from ivcp_eval.judge import JudgeError
    from ivcp_eval.scores import ScoreMissing
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    dataset = bridge.build(benchmark, request.limit)
    with Journal(cell.journal).open() as journal:
        model = answers(journal)
        prompts = bridge.prompts(dataset, model)
        work = cell.folder / "vlmeval"
        predictions = bridge.infer(dataset, model, work, prompts.broken)
        problem = bridge.data_problem(benchmark)
        try:
            scored = bridge.score(benchmark, dataset, predictions, judge)
        except (JudgeError, ScoreMissing) as error:
            scored, problem = bridge.Scored({}, {}), f"no score: {error}"
        samples = bridge.sample_rows(benchmark, dataset, prompts, journal, scored.samples)
        failed = [row for row in samples if row["error"]]
        if failed and not problem:
            problem = f"{len(failed)} of {len(samples)} samples failed, e.g. {failed[0]['index']}: {failed[0]['error']}"
        if not request.timing:
            samples = [{**row, "prefill_ms": None, "decode_ms": None} for row in samples]
        write_samples(cell.predictions, samples)
        used = [journal.records[row["prompt_sha256"]] for row in samples if not row["error"]]
        record = {**_record(cell, scored, samples, used, problem, request.timing), "timeout_s": request.timeout}
        write_json(cell.record, record)
    if record["status"] == "ok":
        shutil.rmtree(work)
    return record


def record_failure(cell: Cell, reason: str, timing: bool) -> None:
    """Note in the cell's ``run.json`` why it cannot be measured at all."""
    from ivcp_eval.vlmeval_bridge.evaluate import Scored

    cell.folder.mkdir(parents=True, exist_ok=True)
    write_json(cell.record, _record(cell, Scored({}, {}), [], [], reason, timing))


def _record(
    cell: Cell,
    scored: Scored,
    samples: Sequence[Mapping[str, Any]],
    used: Sequence[Mapping[str, Any]],
    problem: str,
    timing: bool,
) -> dict[str, Any]:
    status = "ok" if not problem else ("incomplete" if scored.metrics else "failed")
    prompt = sum(u["visual_tokens"] for u in used)
    variant = cell.identity.variant

    def share(key: str) -> float | None:
        """Mean over visual tokens, so that big images weigh as they cost."""
        if not prompt:
            return None
        return sum((u[key] if u[key] is not None else 1.0) * u["visual_tokens"] for u in used) / prompt

    return {
        "status": status,
        "reason": problem or scored.remark,
        "identity": json.loads(cell.identity.canonical),
        "metrics": {name: {"score": score, "scale": scale} for name, (score, scale) in scored.metrics.items()},
        "faithfulness": make_method(variant.method, variant.parameters).faithfulness,
        "judge_failures": scored.judge_failures,
        "n_samples": len(samples),
        "n_clusters": len({row["cluster"] for row in samples}),
        "n_failed": sum(bool(row["error"]) for row in samples),
        "together": any(u.get("together") for u in used),
        "visual_tokens_prompt_mean": prompt / len(used) if used else None,
        "ratio_kept_final": sum(u["visual_kept"] for u in used) / prompt if prompt else None,
        "ratio_layer_mean": share("layer_mean_ratio"),
        "ratio_flops": share("flops_ratio"),
        "ratio_kv_cache": share("kv_ratio"),
        "new_tokens_mean": statistics.fmean(u["new_tokens"] for u in used) if used else None,
        "prefill_ms_median": _median(used, "prefill_ms") if timing else None,
        "decode_ms_per_token_median": _median(used, "decode_ms") if timing else None,
        "vision_ms_median": _median(used, "vision_ms") if timing else None,
        **_git(),
        "device": _device_name(cell.identity.placement["device"]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds") if timing else "",
    }


def _median(records: Iterable[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return statistics.median(values) if values else None


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device != "cpu" else "cpu"


def _git() -> dict[str, Any]:
    """Commit of the code, and whether tracked files differ from it; an installed package has its version instead."""
    if locations.CHECKOUT is None:  # what it is installed in may be a checkout of something else
        return {"ivcp_commit": f"version {ivcp_eval.__version__}, code {cells.code_hash()}", "ivcp_dirty": None}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=cells.ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    dirty = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"ivcp_commit": commit or "", "ivcp_dirty": None if dirty is None else bool(dirty)}


# -- rows -----------------------------------------------------------------------------------------------------------


def cell_rows(weights: models.Weights, benchmark: Benchmark, cell: Cell, csv: Path) -> list[dict[str, Any]]:
    """The CSV rows of one cell: one for each metric, or one that says why there is none."""
    identity, variant = cell.identity, cell.identity.variant
    record = json.loads(cell.record.read_text(encoding="utf-8"))
    measured = (
        *("n_samples", "n_clusters", "n_failed", "judge_failures", "status", "reason"),
        *("visual_tokens_prompt_mean", "ratio_kept_final"),
        *("ratio_layer_mean", "ratio_kv_cache", "new_tokens_mean", "prefill_ms_median", "decode_ms_per_token_median"),
        *("vision_ms_median", "ivcp_commit", "ivcp_dirty", "device", "date"),
    )
    common = {
        "model": variant.model,
        "checkpoint": weights.checkpoint.hub or weights.source.name,
        "revision": weights.revision,
        "family": weights.family,
        "method": variant.method,
        "method_parameters": identity.method_parameters,
        "method_source": identity.method_source,
        # Rows of a plug-in can be written again where it is not installed any more.
        "faithfulness": record.get("faithfulness") or make_method(variant.method, variant.parameters).faithfulness,
        "preset": identity.method_parameters.get("preset", ""),
        "seed": variant.seed,
        "ratio_asked": variant.asked,
        "budget": variant.budget.label if variant.budget else "",
        "ratio_method": None if variant.budget and variant.budget.problem else variant.ratio,
        "ratio_flops": record.get("ratio_flops"),
        "benchmark": benchmark.name,
        "benchmark_sha256": identity.data,
        "prompt_sha256": identity.prompt,
        **identity.limits,
        "judge": identity.judge,
        **{f"{name}_version": number for name, number in identity.versions.items()},
        "dtype": identity.placement["dtype"],
        "attention": identity.placement["attention"],
        "trained_weights": weights.trained,
        "run_id": identity.hash,
        "predictions": Path(_relative(cell.predictions, csv.parent)).as_posix(),
        **{name: record[name] for name in measured},
    }
    metrics = record["metrics"] or {(benchmark.metrics[0].name if benchmark.metrics else "score"): {}}
    return [
        {**common, "metric": name, "score": value.get("score"), "score_scale": value.get("scale")}
        for name, value in metrics.items()
    ]


def _relative(path: Path, folder: Path) -> str:
    import os.path

    return os.path.relpath(path.resolve(), folder.resolve())
