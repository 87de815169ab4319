"""From a spec to hashed cells and units of work on this machine: weights, data, limits. Nothing is run.

Knows no method and no family by name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark, DataMissing, clips, notices
from ivcp_eval.interface import models
from ivcp_eval.interface.registry import adapter, default_parameters, make_method, method_source, parameters_of
from ivcp_eval.interface.variants import Server, Variant
from ivcp_eval.runs.planning import cells, data
from ivcp_eval.runs.planning.cells import Cell, Identity
from ivcp_eval.runs.planning.closure import code_of
from ivcp_eval.runs.planning.options import Options
from ivcp_eval.runs.planning.placement import Limits, Placement, quantiser
from ivcp_eval.runs.planning.spec import Spec
from ivcp_eval.runs.store import manifest
from ivcp_eval.vlmeval_bridge.environment import check_folder
from ivcp_eval.vlmeval_bridge.judge import EXACT_MATCHING, JudgeConfig, judge_for

if TYPE_CHECKING:
    from ivcp_eval.interface.models import Weights


@dataclass(frozen=True)
class Unit:
    """Rows ``start`` to ``stop`` of one benchmark, to be answered by one loaded model under all variants of a run.

    What a server answers (`Unit.server`) is a unit of its own.
    """

    model: str
    benchmark: Benchmark
    start: int
    stop: int
    cells: tuple[Cell, ...]
    placement: Placement

    @cached_property
    def name(self) -> str:
        """Equal for equal work in every process."""
        text = " ".join(cell.identity.hash + ("exact" if cell.exact else "") for cell in self.cells)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{self.model}.{self.benchmark.name}.{self.start:07d}-{self.stop:07d}.{digest}"

    @property
    def server(self) -> Server | None:
        """Who answers; None for the model in memory."""
        return self.cells[0].identity.variant.server

    @property
    def pending(self) -> list[Cell]:
        """Its cells that are not finished."""
        return [cell for cell in self.cells if cell.finished() is None]


@dataclass(frozen=True)
class ModelPlan:
    """One model of a run: where and how it runs, and the cells of every benchmark whose data is here."""

    weights: Weights
    placement: Placement
    limits: Limits
    groups: Mapping[str, tuple[Benchmark, tuple[Cell, ...]]]

    def placement_of(self, cell: Cell) -> Placement:
        """Where and how the model runs for a cell: as for all others, unless its method has it loaded otherwise."""
        found = cell.identity.placement
        return dataclasses.replace(self.placement, dtype=found["dtype"], attention=found["attention"])

    def timed(self, cells: Iterable[Cell]) -> tuple[Cell, ...]:
        """Those whose times are comparable: of servers, and of the model as it is loaded for all but a few."""
        return tuple(
            cell for cell in cells if cell.identity.variant.server or self.placement_of(cell) == self.placement
        )


@dataclass
class RunPlan:
    """A run on this machine.

    Attributes:
        runs: where cells live.
        models: by short name. problems: why models or benchmarks cannot run here; the others can.
        notices: what to know before running: partial data, metrics that a limit leaves without a score.
        misfits: variants that their model cannot run, each with the reason, as far as was looked; their cells become
            rows that say so.
    """

    spec: Spec
    runs: Path
    models: dict[str, ModelPlan] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    @property
    def state(self) -> Path:
        """Folder of leases, marks and logs."""
        return self.spec.state(self.runs)

    @property
    def options(self) -> Options:
        """Of the spec."""
        return self.spec.options

    def units(self) -> tuple[Unit, ...]:
        """Every unit, model by model, in each the longest benchmarks first."""
        return self._units

    @cached_property
    def _units(self) -> tuple[Unit, ...]:
        return tuple(self._split())

    def _split(self) -> Iterator[Unit]:
        limit, shard = self.options.limit, self.options.shard
        for name, model in self.models.items():
            sized = [(data.rows(benchmark, limit), benchmark, group) for benchmark, group in model.groups.values()]
            sized.sort(key=lambda entry: -entry[0])
            cells = [cell for _, _, group in sized for cell in group]
            here = [cell for cell in cells if cell.identity.variant.server is None]
            # One placement after the other, the usual one first, so that a worker loads the model once for each.
            for placement in dict.fromkeys([model.placement, *map(model.placement_of, here)]):
                for n, benchmark, group in sized:
                    own = tuple(cell for cell in group if cell in here and model.placement_of(cell) == placement)
                    for start in range(0, n if own else 0, shard):
                        yield Unit(name, benchmark, start, min(n, start + shard), own, placement)
            for n, benchmark, group in sized:
                for served in (cell for cell in group if cell not in here):
                    for start in range(0, n, shard):
                        yield Unit(name, benchmark, start, min(n, start + shard), (served,), model.placement)

    def cells(self) -> Iterator[tuple[ModelPlan, Benchmark, Cell]]:
        """Every cell."""
        for model in self.models.values():
            for benchmark, group in model.groups.values():
                for cell in group:
                    yield model, benchmark, cell

    def budgets(self) -> list[str]:
        """One line per variant that holds a budget: the ratio that was found for it."""
        variants = [cell.identity.variant for _, _, cell in self.cells()]
        held = [variant for variant in variants if variant.budget and not variant.budget.problem]
        if not held:
            return []
        from ivcp_eval.engine.cost.predicted import described

        return list(dict.fromkeys(map(described, held)))


def make(
    spec: Spec,
    runs: Path | None = None,
    device: str = "",
    *,
    plan_only: bool = False,
    fetch: Callable[[str], None] | None = None,
) -> RunPlan:
    """Find weights and data of every model, and hash every cell; what is missing becomes a problem, not an error.

    Args:
        runs: where cells live (default ``results/runs``). device: of this worker, in place of the spec's.
        plan_only: only plan, look or score, so this machine need not have the device; that of a full-size model is
            then the one of the run that was started, or CUDA. Weights are looked for on this machine alone.
        fetch: have the data of a model that can run fetched where it is not here; is told of it.
    """
    runs = runs or cells.RUNS
    check_folder(runs)
    plan = RunPlan(spec, runs)
    fetch_once = functools.cache(lambda name: data.fetch_missing([name], fetch) if fetch else None)
    for model, folder in spec.models.items():
        if not spec.benchmarks(model):
            continue
        placed = device or spec.options.device or (manifest.device(plan.state, model) if plan_only else "")
        try:
            plan.models[model], missing = _model_plan(plan, model, folder, placed, plan_only, fetch_once)
        except (models.MissingWeights, DataMissing, ValueError, OSError) as error:
            plan.problems.append(f"{model}: {error}")
            continue
        plan.problems += [f"{model}: {text}" for text in missing]
        plan.notices += [f"{model}: {text}" for text in _asked_twice(spec.variants(model))]
    return plan


def _asked_twice(variants: Iterable[Variant]) -> list[str]:
    """A line for every server that answers for several variants in the same way."""
    of: dict[str, list[Variant]] = {}
    for variant in variants:
        if variant.server is not None:
            of.setdefault(variant.server.target, []).append(variant)
    return [
        f"{' and '.join(f'{v.method} {v.ratio:g}' for v in same)} are asked of one server in the same way "
        f"({server.base_url}), so they differ by chance alone; give each its own base_url, model or options"
        for same in of.values()
        if len(same) > 1 and (server := same[0].server) is not None
    ]


def _model_plan(
    plan: RunPlan, model: str, folder: str | None, device: str, plan_only: bool, fetch: Callable[[str], None]
) -> tuple[ModelPlan, list[str]]:
    """One model, and why benchmarks of it cannot run here; DataMissing if none can."""
    spec = plan.spec
    if all(variant.server for variant in spec.variants(model)):
        weights, placement = models.served(model, folder), Placement("", "", "")
    else:
        weights = models.locate(model, folder, offline=True if plan_only else None)
        placement = _placement(spec.options, weights, device, plan_only)
    limits = _limits(spec.options, weights)
    own = weights.checkpoint.methods
    tuned = {v.key: v.tuned(own.get(v.method, {}), default_parameters(v.method)) for v in spec.variants(model)}
    # Layers are checked before a run alone: a plan without budgets imports nothing heavy.
    chosen = not plan_only and any(not v.server and v.parameters.keys() - set(v.implied) for v in tuned.values())
    if chosen or any(variant.budget for variant in tuned.values()):
        from ivcp_eval.engine.cost.predicted import Decoder, misfit, solve_budget  # and with it transformers

        decoder = Decoder.of(weights)
        tuned = {key: solve_budget(variant, decoder) for key, variant in tuned.items()}
        plan.misfits += [f"{v.name} cannot run: {why}" for v in tuned.values() if (why := misfit(v, decoder.facts))]
    groups: dict[str, tuple[Benchmark, tuple[Cell, ...]]] = {}
    missing: list[str] = []
    for name in spec.benchmarks(model):
        fetch(name)
        declared = data.find(name)
        sampling = spec.options.sampling if declared.sampling else None
        benchmark = dataclasses.replace(declared, sampling=str(sampling)) if sampling else declared
        try:
            digest = data.digest(benchmark)
            video = "" if benchmark.sampling == "frames" else benchmark.sampling
            if declared.sampling not in ("", "frames"):
                video += f", {clips.decoder()}"
            data.rows(benchmark, spec.options.limit)  # a file that cannot be read is said now
            for line in notices(benchmark, data.path_of(benchmark), spec.options.limit):
                if line not in plan.notices:
                    plan.notices.append(line)
        except (DataMissing, ValueError) as error:  # not here, or not the file it should be
            missing.append(str(error))
            continue
        identities = _Identities(plan, weights, placement, limits, benchmark, digest, video)
        variants = [variant for variant, of in spec.cells if of == name and variant.model == model]
        groups[name] = benchmark, tuple(identities.cell(tuned[variant.key]) for variant in variants)
    if not groups:
        raise DataMissing("\n".join(missing))
    return ModelPlan(weights, placement, limits, groups), missing


def _placement(options: Options, weights: Weights, device: str, plan_only: bool) -> Placement:
    full_size = not weights.checkpoint.local
    device = device or ("cuda" if plan_only and full_size else "")
    placement = Placement(device, options.dtype, options.attention).resolve(plan_only)
    if placement.device == "cpu" and not device and full_size:
        raise ValueError(
            f"no CUDA device was found and {weights.checkpoint.name} is a full-size model. Run on a GPU machine, or "
            "pass DEVICE=cpu (--device cpu) to wait for it here."
        )
    return placement


def _limits(options: Options, weights: Weights) -> Limits:
    published = Limits.published(weights)
    limits = Limits(
        published.min_pixels if options.min_pixels is None else options.min_pixels,
        published.max_pixels if options.max_pixels is None else options.max_pixels,
        options.max_new_tokens or published.max_new_tokens,
    )
    if (limits.min_pixels or 0) > (limits.max_pixels or float("inf")):
        raise ValueError(
            f"min_pixels {limits.min_pixels} is above max_pixels {limits.max_pixels} (of {weights.family}, where not "
            "given): lower the first or raise the second"
        )
    return limits


@dataclass(frozen=True)
class _Identities:
    """Identities of the cells of one model on one benchmark."""

    plan: RunPlan
    weights: Weights
    placement: Placement
    limits: Limits
    benchmark: Benchmark
    digest: str
    video: str

    @cached_property
    def _prompt(self) -> str:
        """SHA-256 of the wording: the family's template for the benchmark's kind, or the benchmark's own."""
        wording, benchmark = None, self.benchmark
        if benchmark.kind and benchmark.prompt == "family":
            family = adapter(self.weights.family)
            wording = family.prompt(benchmark.kind, "{question}", {"A": "{A}", "B": "{B}"}, "{hint}")
        return hashlib.sha256((wording or f"dataset:{benchmark.vlmeval}").encode()).hexdigest()

    def cell(self, variant: Variant) -> Cell:
        """The cell of one variant."""
        options, method = self.plan.options, make_method(variant.method, variant.parameters)
        placement = {**dataclasses.asdict(self.placement), **method.loading}
        placement["device"] = self.placement.device.partition(":")[0]
        limits, sent, server = self.limits, adapter(self.weights.family).stated(), variant.server
        if self.weights.quantised:
            placement |= {
                "weights": self.weights.quantised,
                "quantiser": quantiser(self.weights.quantised, self.placement.device),
            }
        if server is not None:
            placement = dict.fromkeys(placement, "")
            limits, sent = Limits(None, None, limits.max_new_tokens), fields_sent(server, limits.max_new_tokens)
        answering = variant.method, self.weights.family
        # Frames that are pictures are encoded for the method that asks how they move.
        coded = ["av"] if "motion" in method.needs and self.benchmark.sampling else []
        code = code_of(*answering) if server is None else code_of(*answering, served=True)
        identity = Identity(
            variant=variant,
            method_parameters=parameters_of(method),
            weights="" if server else self.weights.revision,
            benchmark=self.benchmark.name,
            data=self.digest,
            scoring=self.benchmark.scoring,
            limit=options.limit,
            prompt=self._prompt,
            judge=judge_name(options, self.benchmark),
            limits=dataclasses.asdict(limits),
            placement=placement,
            versions=cells.versions(*coded),
            code=code.hash,
            method_source=method_source(variant.method),
            generation=sent,
            video=self.video,
        )
        return Cell(identity, self.plan.runs, options.exact, code.files)


def fields_sent(server: Server, max_new_tokens: int) -> dict[str, Any]:
    """What is sent to a server beside model and messages: greedy decoding, and what the user's options say."""
    ours = {"temperature": 0, "max_tokens": max_new_tokens}
    return {name: value for name, value in {**ours, **server.options}.items() if value is not None}


def judge_config(options: Options, benchmark: Benchmark) -> JudgeConfig | None:
    """The judge that is asked about the benchmark's answers; None if nobody is."""
    judge = judge_for(options.judge, benchmark.judge)
    if judge in ("none", EXACT_MATCHING):
        return None
    return JudgeConfig(judge, options.judge_url, extra=options.judge_options or {})


def judge_name(options: Options, benchmark: Benchmark) -> str:
    """As a cell's identity has it."""
    config = judge_config(options, benchmark)
    return config.identity if config else judge_for(options.judge, benchmark.judge)


def write_manifest(plan: RunPlan) -> Path:
    """Note which cells make up the run, and what the CSV says of their models; returns the file."""
    described_models = {
        name: {
            "checkpoint": model.weights.checkpoint.hub or model.weights.source.name,
            "hub": bool(model.weights.checkpoint.hub),
            "family": model.weights.family,
            "revision": model.weights.revision,
            "trained": model.weights.trained,
            "device": model.placement.device.partition(":")[0],
        }
        for name, model in plan.models.items()
    }
    listed: Sequence[Cell] = [cell for _, _, cell in plan.cells()]
    folders = [(cell.identity.variant.model, str(cell.folder.relative_to(cell.runs))) for cell in listed]
    manifest.write_spec(plan.state, {**plan.spec.raw, "name": plan.spec.name})
    return manifest.write(plan.state, plan.spec.name, plan.problems, described_models, folders, plan.runs.name)
