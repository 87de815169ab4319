"""What a cell measured: the content of its ``run.json``, and from that its rows of the results CSV."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ivcp_eval
from ivcp_eval import files
from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.interface import models
from ivcp_eval.interface.registry import make_method
from ivcp_eval.runs.planning import cells
from ivcp_eval.runs.planning.cells import Cell

if TYPE_CHECKING:
    from ivcp_eval.vlmeval_bridge.evaluate import Scored


def record_of(
    cell: Cell,
    scored: Scored,
    samples: Sequence[Mapping[str, Any]],
    used: Sequence[Mapping[str, Any]],
    problem: str,
    timing: bool,
) -> dict[str, Any]:
    """The content of a cell's ``run.json``.

    Args:
        scored: what the evaluation left. samples: per-sample rows, failed ones included.
        used: journal records of the samples that were answered.
        problem: why the cell is not whole; empty if it is.
        timing: whether times and the date are noted.
    """
    status = "ok" if not problem else ("incomplete" if scored.metrics else "failed")
    prompt = sum(u["visual_tokens"] for u in used)
    dear = sum(u.get("dear", False) for u in used)
    remarks = [scored.remark, f"{dear} of {len(used)} samples have pictures that cost more at any size" if dear else ""]
    variant = cell.identity.variant

    def share(key: str) -> float | None:
        """Mean over visual tokens, so that big images weigh as they cost."""
        if not prompt:
            return None
        return sum((u[key] if u[key] is not None else 1.0) * u["visual_tokens"] for u in used) / prompt

    return {
        "status": status,
        "reason": problem or "; ".join(filter(None, remarks)),
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
        "device": _device_names(cell, used),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds") if timing else "",
    }


def _median(records: Iterable[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return statistics.median(values) if values else None


def _device_names(cell: Cell, used: Sequence[Mapping[str, Any]]) -> str:
    """What answered, by the answers themselves: who scores may have no GPU, and several kinds may share a cell."""
    names = sorted({record["device"] for record in used if record.get("device")})
    return " + ".join(names) or ("cpu" if cell.identity.placement["device"] == "cpu" else "")


def _git() -> dict[str, Any]:
    """Commit of the code, and whether tracked files differ from it; an installed package has its version instead."""
    if files.CHECKOUT is None:  # what it is installed in may be a checkout of something else
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
        "limit": identity.limit,
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
    return os.path.relpath(path.resolve(), folder.resolve())
