"""Lines of a cost bench, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivcp_eval.reports.csvfile import checked, write_csv
from ivcp_eval.reports.views.costs import BENCH_COLUMNS

#: What the results of these tests say of their decoder, and one size more.
SIZES = {"layers": 10, "kv_heads": 2, "head_dim": 32, "value_dim": None, "hidden": 64}


def bench_line(method: str, ratio: float, **more: Any) -> dict[str, Any]:
    """One line; ``prefill`` and ``end_to_end`` are ratios, known to a hundredth."""
    own = {
        "method": method, "ratio": ratio, "method_parameters": {}, "decoder": SIZES, "device": "cpu", "host": "a core",
        "dtype": "bfloat16", "attention": "sdpa", "visual_tokens": 64, "text_tokens": 10, "new_tokens": 8, "batch": 1,
        "rounds": 5, "prefill_ms": 20.0, "ttft_ms": 25.0, "decode_ms_per_token": 2.0, "kv_bytes": 3 * 2**20,
    }  # fmt: skip
    for stage in ("prefill", "end_to_end"):
        time = more.pop(stage, 1.0)
        own |= {f"{stage}_ratio": time, f"{stage}_low": time - 0.01, f"{stage}_high": time + 0.01}
    return {**own, "requests_per_s": 2 / own["end_to_end_ratio"], **more}


def write_bench(path: Path, lines: list[dict[str, Any]]) -> Path:
    """A file as the bench writes it."""
    rows = [{**line, **{name: json.dumps(line[name]) for name in ("decoder", "method_parameters")}} for line in lines]
    write_csv(path, BENCH_COLUMNS, [checked(row, BENCH_COLUMNS) for row in rows])
    return path
