"""From a sweep file to hashed cells and units of work on this machine. No torch until `make` is called."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.engine.cost.predicted import described
from ivcp_eval.files import write_json
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.planning import cells
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.request import Plan, Request, make_plan
from ivcp_eval.runs.planning.spec import Spec

if TYPE_CHECKING:
    from ivcp_eval.interface.models import Weights


@dataclass(frozen=True)
class Unit:
    """Rows ``start`` to ``stop`` of one benchmark, to be answered by one model under all variants of a sweep."""

    model: str
    benchmark: Benchmark
    start: int
    stop: int
    cells: tuple[Cell, ...]

    @cached_property
    def name(self) -> str:
        """Equal for equal work in every process."""
        text = " ".join(cell.identity.hash + ("exact" if cell.exact else "") for cell in self.cells)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return f"{self.model}.{self.benchmark.name}.{self.start:07d}-{self.stop:07d}.{digest}"

    @property
    def pending(self) -> list[Cell]:
        """Its cells that are not finished."""
        return [cell for cell in self.cells if cell.finished() is None]


@dataclass(frozen=True)
class ModelPlan:
    """One model of a sweep: its request and plan, and the cells of every benchmark."""

    request: Request
    plan: Plan
    groups: dict[str, tuple[Benchmark, tuple[Cell, ...]]]

    @property
    def weights(self) -> Weights:
        """Of the model."""
        return self.plan.weights


@dataclass
class SweepPlan:
    """A sweep on this machine.

    Attributes:
        models: by short name. problems: why models or benchmarks cannot run here; the others can.
        state: folder of leases, marks and logs.
    """

    spec: Spec
    state: Path
    models: dict[str, ModelPlan] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def units(self) -> tuple[Unit, ...]:
        """Every unit, model by model, the longest benchmarks first."""
        return self._units

    @cached_property
    def _units(self) -> tuple[Unit, ...]:
        """Made once: counting rows reads whole files, of gigabytes for some benchmarks."""
        return tuple(self._split())

    def _split(self) -> Iterator[Unit]:
        for name, model in self.models.items():
            sized = [
                (rows(benchmark, model.request.limit), benchmark, group) for benchmark, group in model.groups.values()
            ]
            for n, benchmark, group in sorted(sized, key=lambda entry: -entry[0]):
                for start in range(0, n, self.spec.shard):
                    yield Unit(name, benchmark, start, min(n, start + self.spec.shard), group)

    def budgets(self) -> list[str]:
        """One line per variant that holds a budget: the ratio that was found for it, or why it cannot run."""
        variants = [cell.identity.variant for _, _, cell in self.scored()]
        return list(dict.fromkeys(described(variant) for variant in variants if variant.budget))

    def scored(self) -> Iterator[tuple[ModelPlan, Benchmark, Cell]]:
        """Every cell."""
        for model in self.models.values():
            for benchmark, group in model.groups.values():
                for cell in group:
                    yield model, benchmark, cell


def make(
    spec: Spec, runs: Path | None = None, device: str = "", timing: bool | None = None, elsewhere: bool = False
) -> SweepPlan:
    """Find weights and data of every model, and hash every cell; what is missing becomes a problem, not an error.

    Args:
        runs: where cells live (default ``results/runs``). device: of this worker. timing: see `planning.Request`.
        elsewhere: only plan, look or score; without a ``device`` it is then that of the run which was started.
    """
    from ivcp_eval.benchmarks import DataMissing
    from ivcp_eval.interface.models import MissingWeights

    runs = runs or cells.RUNS
    made = SweepPlan(spec, runs.parent / "sweeps" / spec.name)
    for model, folder in spec.models.items():
        variants, wanted = spec.variants(model), spec.benchmarks(model)
        if not wanted:
            continue
        placed = device or (_noted_device(made.state, model) if elsewhere else "")
        request = replace(_request(spec, model, folder, tuple(wanted), runs, placed, timing), elsewhere=elsewhere)
        try:
            plan = make_plan(request, variants)
        except (MissingWeights, DataMissing, ValueError, OSError) as error:
            made.problems.append(f"{model}: {error}")
            continue
        made.problems += [f"{model}: {text}" for text in plan.missing]
        made.models[model] = ModelPlan(request, plan, _groups(spec, plan, variants))
    return made


def _request(
    spec: Spec, model: str, folder: str | None, data: tuple[str, ...], runs: Path, device: str, timing: bool | None
) -> Request:
    options: dict[str, Any] = {k: v for k, v in spec.options.items() if k not in ("shard", "batch", "timing")}
    options["device"] = device or options.get("device", "")
    timed = bool(spec.options.get("timing", True)) if timing is None else timing
    return Request(Variant(model), data=data, model_path=folder, runs=runs, timing=timed, **options)


def _groups(spec: Spec, plan: Plan, variants: list[Variant]) -> dict[str, tuple[Benchmark, tuple[Cell, ...]]]:
    """The cells by benchmark, without those that the sweep leaves out."""
    groups: dict[str, tuple[Benchmark, tuple[Cell, ...]]] = {}
    wanted: dict[str, list[Variant]] = {}
    for variant, name in spec.cells:
        wanted.setdefault(name, []).append(variant)
    for i, (benchmark, cell) in enumerate(plan.cells):
        if variants[i % len(variants)] in wanted[benchmark.name]:
            before = groups.get(benchmark.name, (benchmark, ()))[1]
            groups[benchmark.name] = benchmark, (*before, cell)
    return groups


def rows(benchmark: Benchmark, limit: int | None) -> int:
    """Rows of a benchmark's file, which is here."""
    from ivcp_eval.vlmeval_bridge.environment import data_root

    path = benchmark.path or data_root() / f"{benchmark.vlmeval}.tsv"
    n = _rows(path, path.stat().st_mtime_ns)
    return min(n, limit) if limit else n


@cache
def _rows(path: Path, _changed: int) -> int:
    before = csv.field_size_limit(2**31 - 1)  # pictures are cells, and the limit is the process's
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return sum(1 for _ in csv.reader(stream, delimiter="\t")) - 1
    finally:
        csv.field_size_limit(before)


# -- what `ivcp sweep results` needs, without weights, data or a GPU ---------------------------------------------------


def _manifest(state: Path) -> Path:
    return state / "manifest.json"


def _noted_device(state: Path, model: str) -> str:
    """Kind of device that the sweep was started for; empty if it was not, or before this was noted."""
    if not _manifest(state).is_file():
        return ""
    noted: dict[str, Any] = json.loads(_manifest(state).read_text(encoding="utf-8"))["models"]
    return str(noted.get(model, {}).get("device", ""))


def write_manifest(plan: SweepPlan) -> Path:
    """Note which cells make up the sweep, and what the CSV says of their models; returns the file."""
    plan.state.mkdir(parents=True, exist_ok=True)
    found = {
        "name": plan.spec.name,
        "problems": plan.problems,
        "models": {
            name: {
                "checkpoint": model.weights.checkpoint.hub or model.weights.source.name,
                "hub": bool(model.weights.checkpoint.hub),
                "family": model.weights.family,
                "revision": model.weights.revision,
                "trained": model.weights.trained,
                "device": model.plan.placement.device.partition(":")[0],
            }
            for name, model in plan.models.items()
        },
        "cells": [
            {"model": cell.identity.variant.model, "folder": str(cell.folder.relative_to(cell.runs))}
            for _, _, cell in plan.scored()
        ],
    }
    path = _manifest(plan.state)
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != found:
        write_json(path, found)
    return path
