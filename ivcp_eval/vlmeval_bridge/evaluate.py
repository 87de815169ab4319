"""One cell through VLMEvalKit: its `build_dataset`, its inference loop, its `evaluate`.

VLMEvalKit writes into a folder made for this cell and emptied first, since its caches are keyed by sample index alone
and would hand one run's verdicts to another. What survives a kill is our journal.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import vlmeval.dataset
from vlmeval.inference import infer_data_job

from ivcp_eval import scores
from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.journal import Journal
from ivcp_eval.vlmeval_bridge.datasets import message_key
from ivcp_eval.vlmeval_bridge.environment import lossless_files
from ivcp_eval.vlmeval_bridge.model import PrunedVLM


class DataMissing(RuntimeError):
    """A benchmark's data is not on this machine and cannot be fetched; the message says how to get it."""


def build(benchmark: Benchmark, limit: int | None) -> Any:
    """VLMEvalKit's data set object, cut to its first ``limit`` rows.

    Raises:
        DataMissing: no file here and no download possible. ValueError: a file without the needed columns.
    """
    try:
        dataset = vlmeval.dataset.build_dataset(benchmark.vlmeval)
    except ValueError:
        raise
    except (OSError, RuntimeError, AssertionError) as error:
        dataset, reason = None, f"{type(error).__name__}: {error}"
    else:
        reason = "VLMEvalKit does not know it, and no such TSV is in its data root"
    if dataset is None:
        from ivcp_eval.vlmeval_bridge.environment import data_root

        raise DataMissing(
            f"benchmark {benchmark.name!r}: the data is not here and could not be fetched ({reason}). "
            f"Put {benchmark.vlmeval}.tsv into {data_root()} (set LMUData to use another folder). {benchmark.source}"
        )
    if limit:
        dataset.data = dataset.data.iloc[:limit]
    return dataset


def prompts(dataset: Any, model: PrunedVLM) -> tuple[dict[str, str], dict[str, str]]:
    """Build every prompt as VLMEvalKit's loop will.

    Returns:
        (index -> prompt key) and (index -> error) for rows whose prompt cannot be built, e.g. a corrupt image.
    """
    model.set_dump_image(dataset.dump_image)
    custom = model.use_custom_prompt(dataset.dataset_name) and not getattr(dataset, "force_use_dataset_prompt", False)
    keys: dict[str, str] = {}
    broken: dict[str, str] = {}
    for i in range(len(dataset.data)):
        line = dataset.data.iloc[i]
        try:
            message = model.build_prompt(line, dataset=dataset.dataset_name) if custom else dataset.build_prompt(line)
            keys[str(line["index"])] = message_key(message)
        except (OSError, ValueError, AssertionError, SyntaxError) as error:
            broken[str(line["index"])] = f"{type(error).__name__}: {error}"
    return keys, broken


def infer(dataset: Any, model: PrunedVLM, folder: Path, broken: Mapping[str, str]) -> Path:
    """VLMEvalKit's inference loop over the rows that have a prompt; the other rows join with an empty answer.

    Returns:
        The prediction file (TSV) with every row, so that a broken row counts as wrong and is never dropped.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole = dataset.data
    dataset.data = whole[~whole["index"].astype(str).isin(broken)].copy()
    name = model.variant.name
    try:
        with lossless_files(), torch.inference_mode():
            infer_data_job(model, str(folder), name, dataset)
    finally:
        dataset.data = whole
    path = folder / f"{name}_{dataset.dataset_name}.tsv"
    if broken:
        answered = pd.read_csv(path, sep="\t")
        lost = whole[whole["index"].astype(str).isin(broken)].drop(columns="image", errors="ignore").copy()
        lost["prediction"] = ""
        order = {str(index): i for i, index in enumerate(whole["index"])}
        joined = pd.concat([answered, lost]).sort_values("index", key=lambda c: c.astype(str).map(order))
        joined.to_csv(path, sep="\t", index=False)
    return path


def score(
    benchmark: Benchmark, dataset: Any, predictions: Path, judge: Mapping[str, Any]
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """VLMEvalKit's own evaluation, and the numbers it left: (metric -> (score, scale), index -> sample score).

    For an undeclared data set every number of the returned table is a metric on an unknown scale of 100.
    """
    with lossless_files():
        returned = dataset.evaluate(str(predictions), **judge)
    name = str(judge.get("model", "exact_matching"))
    stem, folder = predictions.stem, predictions.parent
    metrics = scores.read_metrics(benchmark, folder, stem, name)
    if not benchmark.metrics:
        metrics = _all_numbers(returned)
    samples = scores.read_samples(benchmark.samples, folder, stem, name) if benchmark.samples else {}
    return metrics, samples


def _all_numbers(returned: Any) -> dict[str, tuple[float, float]]:
    if isinstance(returned, pd.DataFrame):
        returned = {
            "/".join([*(str(v) for v in row.values() if not _is_number(v)), str(column)]): value
            for row in returned.to_dict("records")
            for column, value in row.items()
        }
    flat = {str(k): float(v) for k, v in dict(returned).items() if _is_number(v)}
    if not flat:
        raise scores.ScoreMissing(
            f"the evaluator returned no numbers: {returned!r}; declare its metrics under datasets/"
        )
    return {name: (value, 100.0) for name, value in flat.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def sample_rows(
    benchmark: Benchmark,
    dataset: Any,
    keys: Mapping[str, str],
    broken: Mapping[str, str],
    journal: Journal,
    sample_scores: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One record per row of the data set, in its order, in the per-sample schema (ivcp_eval.results_schema)."""
    rows = []
    fields = ("visual_tokens", "visual_kept", "layer_mean_ratio", "kv_ratio", "prefill_ms", "decode_ms", "new_tokens")
    for line in dataset.data.to_dict("records"):
        index = str(line["index"])
        key = keys.get(index, "")
        answer = journal.records.get(key, {})
        rows.append(
            {
                "index": index,
                "cluster": str(line.get(benchmark.cluster) or index) if benchmark.cluster else index,
                "category": str(line.get("category", "")),
                "prompt_sha256": key,
                "prediction": answer.get("raw", answer.get("prediction", "")),
                "answer": str(line.get("answer", "")),
                "score": sample_scores.get(index),
                **{name: answer.get(name) for name in fields},
                "error": broken.get(index) or answer.get("error", ""),
            }
        )
    return rows
