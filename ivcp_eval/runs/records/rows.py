"""The rows of the results CSV, from a cell's record."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.interface.models import Weights, find
from ivcp_eval.interface.variants import Server, Variant
from ivcp_eval.reports.schema import COLUMN_NAMES
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.records.record import CellRecord

#: Columns that a record has under the same name.
_RECORDED = (
    *("n_samples", "n_clusters", "n_failed", "judge_failures", "status", "reason", "faithfulness"),
    *("visual_tokens_prompt_mean", "ratio_kept_final", "ratio_layer_mean", "ratio_flops", "ratio_kv_cache"),
    *("ratio_kv_analytic", "ratio_flops_analytic"),
    *("prompt_tokens_mean", "new_tokens_mean", "prefill_ms_median", "decode_ms_per_token_median", "vision_ms_median"),
    *("first_token_ms_median", "requests_per_s"),
    *("ivcp_commit", "ivcp_dirty", "device", "date"),
)


def cell_rows(weights: Weights, benchmark: Benchmark, cell: Cell, csv: Path) -> list[dict[str, Any]]:
    """The CSV rows of one cell: one for each metric, or one that says why there is none."""
    identity, variant = cell.identity, cell.identity.variant
    record = CellRecord.from_json(json.loads(cell.record.read_text(encoding="utf-8")))
    server = variant.server
    versions = {f"{name}_version": number for name, number in identity.versions.items()}
    common = {
        "model": variant.model,
        "checkpoint": weights.checkpoint.hub or weights.source.name,
        "revision": identity.weights,
        "served": server.to_json() if server else None,
        "family": weights.family,
        "method": variant.method,
        "method_parameters": {**identity.method_parameters, **_served(server)},
        "set_parameters": " ".join(_unusual(variant)),
        "method_source": identity.method_source,
        "preset": identity.method_parameters.get("preset", ""),
        "seed": variant.seed,
        "ratio_asked": variant.requested,
        "budget": variant.budget.label if variant.budget else "",
        "ratio_method": None if variant.budget and variant.budget.problem else variant.ratio,
        "benchmark": benchmark.name,
        "benchmark_sha256": identity.data,
        "prompt_sha256": identity.prompt,
        "limit": identity.limit,
        **identity.limits,
        **({"generation": identity.generation} if "generation" in COLUMN_NAMES else {}),
        "video": identity.video,
        "judge": identity.judge,
        # The other libraries' are in run.json only.
        **{name: number for name, number in versions.items() if name in COLUMN_NAMES},
        "dtype": identity.placement["dtype"],
        "attention": identity.placement["attention"],
        "quantised": " ".join(identity.placement.get(name, "") for name in ("weights", "quantiser")).strip(),
        "trained_weights": None if server else weights.trained,
        "run_id": identity.hash,
        "predictions": Path(_relative(cell.predictions, csv.parent)).as_posix(),
        **{name: getattr(record, name) for name in _RECORDED},
    }
    metrics = record.metrics or {(benchmark.metrics[0].name if benchmark.metrics else "score"): {}}
    return [
        {**common, "metric": name, "score": value.get("score"), "score_scale": value.get("scale")}
        for name, value in metrics.items()
    ]


def _unusual(variant: Variant) -> list[str]:
    """Names of the parameters that are neither the method's nor the checkpoint's defaults."""
    own: Mapping[str, Any] = {}
    with suppress(ValueError):  # a model that was removed since
        own = find(variant.model)[1].methods.get(variant.method, {})
    return sorted(name for name, value in variant.parameters.items() if name not in own or own[name] != value)


def _served(server: Server | None) -> dict[str, Any]:
    """What tells the variants of several servers apart."""
    return {} if server is None else {"base_url": server.base_url, "served_model": server.model}


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())
