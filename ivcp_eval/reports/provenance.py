"""Which row is whose baseline, and may the two be compared: what differs between their makings, what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ivcp_eval.reports.table import Row

__all__ = [
    "REFUSED",
    "Against",
    "baseline_of",
    "candidates",
    "differences",
    "label",
    "remarks",
    "sample_differences",
    "unknown_provenance",
]

Against = Literal["none", "same_method"]

REFUSED = (
    "judge",
    "vlmeval_version",
    "prompt_sha256",
    "min_pixels",
    "max_pixels",
    "max_new_tokens",
    "benchmark_sha256",
    "revision",
    "trained_weights",
)
"""Columns whose difference changes scores by itself, so that a comparison would blame or praise the pruning for it."""

_REMARKED = ("checkpoint", "dtype", "device", "attention", "torch_version", "transformers_version", "ivcp_commit")


def _empty(value: Any) -> bool:
    return value is None or value == ""


def _shown(value: Any) -> str:
    text = "empty" if _empty(value) else str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _unequal(baseline: Mapping[str, Any], pruned: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    published = bool(baseline["source"] or pruned["source"])
    found = []
    for name in columns:
        before, after = baseline[name], pruned[name]
        # In an own row an empty cell is a statement (the default); in a published one it is ignorance.
        ignorance = published and (_empty(before) or _empty(after))
        if before != after and not ignorance:
            found.append(f"{name}: baseline {_shown(before)}, results {_shown(after)}")
    return found


def differences(baseline: Row, pruned: Row) -> list[str]:
    """What forbids the comparison, one line per column; empty if nothing does."""
    return _unequal(baseline, pruned, REFUSED)


def remarks(baseline: Row, pruned: Row) -> list[str]:
    """What differs and may matter, but does not forbid the comparison."""
    return _unequal(baseline, pruned, _REMARKED)


def unknown_provenance(baseline: Row, pruned: Row) -> list[str]:
    """Columns of `REFUSED` that a published row does not state, so that nobody can check them."""
    if not (baseline["source"] or pruned["source"]):
        return []
    return [name for name in REFUSED if _empty(baseline[name]) != _empty(pruned[name])]


def sample_differences(baseline: Mapping[str, Row], pruned: Mapping[str, Row]) -> list[str]:
    """Samples of one index that are not the same question; both map the index to the sample's row."""
    found = []
    shared = [index for index in baseline if index in pruned]
    for name, what in (("prompt_sha256", "prompts"), ("answer", "true answers")):
        unlike = [i for i in shared if not _empty(baseline[i][name]) and not _empty(pruned[i][name])]
        unlike = [i for i in unlike if baseline[i][name] != pruned[i][name]]
        if unlike:
            found.append(f"{what} of {len(unlike)} of {len(shared)} samples differ, e.g. index {unlike[0]}")
    return found


def candidates(results: Sequence[Row], baselines: Sequence[Row], *, own: bool) -> list[Row]:
    """Rows to compare: pruned ones and, with a foreign baseline, unpruned ones that are not the baseline itself."""
    if own:
        return [row for row in results if row["method"] != "none"]
    known = {row["run_id"] for row in baselines if row["run_id"]}
    return [row for row in results if row["method"] != "none" or row["run_id"] not in known]


def label(row: Row) -> str:
    """A row's name in messages."""
    ratio = "" if row["ratio_asked"] is None or row["method"] == "none" else f" {row['ratio_asked']:g}"
    budget = f" of {row['budget']}" if row["budget"] else ""
    return f"{row['model']} {row['benchmark']} {row['metric']} {row['method']}{ratio}{budget}"


def baseline_of(row: Row, baselines: Sequence[Row], against: Against) -> Row | str:
    """The one baseline row, or why there is none. Raises ValueError if there are several that fit equally."""
    same = [r for r in baselines if all(r[name] == row[name] for name in ("model", "benchmark", "metric"))]
    if against == "none":
        same = [r for r in same if r["method"] == "none"]
    else:
        same = [r for r in same if all(r[name] == row[name] for name in ("method", "ratio_asked", "budget"))]
    finished = [r for r in same if r["status"] == "ok"]
    if not finished:
        if same:
            return f"its baseline is {same[0]['status']} ({same[0]['reason']})"
        models = sorted({r["model"] for r in baselines})
        hint = "" if row["model"] in models else f"; the baseline file knows the models {', '.join(models) or 'none'}"
        return f"no baseline row{hint}"
    alike = [r for r in finished if not differences(r, row)]
    chosen = alike or finished
    if len(chosen) > 1:
        unlike = [name for name in row if len({str(r[name]) for r in chosen}) > 1]
        raise ValueError(
            f"{len(chosen)} baseline rows fit {label(row)}; they differ in {', '.join(unlike) or 'nothing'}. "
            "Keep one of them in the baseline file."
        )
    return chosen[0]
