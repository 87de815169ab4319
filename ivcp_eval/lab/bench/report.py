"""Where a bench's rows go: a table on the terminal, CSV and JSON beside it, and what they were measured on."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ivcp_eval.files import as_shown, atomic_write, write_json
from ivcp_eval.reports.terminal import fold

GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
COLUMNS = (
    "attention",
    "visual_tokens",
    "text_tokens",
    "batch",
    "variant",
    "ratio",
    "layer",
    "rounds",
    "vision_ms",
    "prefill_ms",
    "prefill_q1",
    "prefill_q3",
    "prefill_ratio",
    "prefill_memory_ms",
    "flop_bound",
    "layer_bound",
    "over_bound",
    "target",
    "met",
    "cut_ms",
    "layers",
    "select_ms",
    "selection_ms",
    "saved_ms",
    "net_ms",
    "decode_ms_per_token",
    "decode_ratio",
    "decode_memory_ms",
    "bandwidth_gb_s",
    "kv_bytes",
    "kv_ratio",
    "peak_bytes",
    "note",
)


def environment(device: str, command: str) -> dict[str, Any]:
    """Command, commit, versions, processor, its load, and the GPU with its clocks at this moment."""
    import torch
    import transformers

    return {
        "command": command,
        "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "gpu": None if device == "cpu" else _gpu(),
    }


def _output(command: list[str]) -> str | None:
    """What a command prints; None if there is no such program or it fails (no git checkout, no driver)."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _gpu() -> dict[str, str] | None:
    line = _output(["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"])
    if not line:
        return None
    return dict(zip(GPU_FIELDS, (part.strip() for part in line.splitlines()[0].split(",")), strict=True))


class Report:
    """Collects rows, prints each group at once, and rewrites the files after each, so that a killed run keeps them.

    Args:
        out: name of the files without an ending; None writes none. before: what `environment` gave.
        columns: of the CSV. shown: of the printed tables, see `table`.
    """

    def __init__(
        self,
        out: Path | None,
        before: dict[str, Any],
        stream: IO[str],
        columns: Sequence[str] = COLUMNS,
        shown: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.out, self.before, self.stream = out, before, stream
        self.columns, self.shown = columns, shown or _SHOWN
        self.after: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
        where = (before["gpu"] or {}).get("name") or f"{before['processor']}, {before['threads']} thread(s)"
        stream.write(f"{where}; torch {before['torch']}, transformers {before['transformers']}\n")

    @property
    def missed(self) -> bool:
        """Whether any row missed its target."""
        return any(row.get("met") is False for row in self.rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take the rows of one cell."""
        self.rows += rows
        self.stream.write(f"\n{table(rows, self.shown)}\n")
        self.stream.flush()
        self._write()

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Write, not show, the rows that there are of a cell that is not finished."""
        self._write(rows)

    def finish(self, after: dict[str, Any]) -> None:
        """Record the clocks after the load too."""
        self.after = after
        self._write()

    def _write(self, more: Sequence[dict[str, Any]] = ()) -> None:
        if self.out is None:
            return
        rows = [*self.rows, *more]
        write_json(self.out.with_name(f"{self.out.name}.json"), {**self.before, "after": self.after, "rows": rows})
        with atomic_write(self.out.with_name(f"{self.out.name}.csv")) as stream:
            writer = csv.DictWriter(stream, self.columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return as_shown(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def table(rows: list[dict[str, Any]], columns: Mapping[str, tuple[str, str]] | None = None) -> str:
    """The rows of one cell as text: ratios beside their bounds.

    Args:
        columns: heading -> (key, format), in order; those without a value in any row are left out.
    """
    columns = columns or _SHOWN
    first = rows[0]
    title = ", ".join(f"{first[key]} {word}" for key, word in _TITLE.items() if key in first)
    shown = [{head: _show(row.get(key), style) for head, (key, style) in columns.items()} for row in rows]
    used = [head for head in columns if any(line[head] for line in shown)]
    names = [head for head in used if head in _NAMES]
    body = fold({head: [line[head] for line in shown] for head in used}, names, "note" if "note" in used else "")
    return f"{title}\n{body}" if title else body


_NAMES = ("variant", "benchmark", "arm")
_TITLE = {"attention": "attention", "visual_tokens": "visual tokens", "batch": "at a time"}
_SHOWN = {
    "variant": ("variant", "{}"),
    "vision ms": ("vision_ms", "{:.1f}"),
    "prefill ms": ("prefill_ms", "{:.1f}"),
    "memory alone ms": ("prefill_memory_ms", "{:.2f}"),
    "x untouched": ("prefill_ratio", "{:.3f}"),
    "FLOP bound": ("flop_bound", "{:.3f}"),
    "layer bound": ("layer_bound", "{:.3f}"),
    "over FLOP bound": ("over_bound", "{:+.1%}"),
    "target": ("target", "<= {:.0%}"),
    "met": ("met", "{}"),
    "cut ms": ("cut_ms", "{:.2f}"),
    "cut before layer": ("layers", "{}"),
    "choosing ms": ("select_ms", "{:.2f}"),
    "selection ms": ("selection_ms", "{:+.1f}"),
    "cut saves ms": ("saved_ms", "{:.1f}"),
    "net ms": ("net_ms", "{:+.1f}"),
    "decode ms/token": ("decode_ms_per_token", "{:.2f}"),
    "memory alone": ("decode_memory_ms", "{:.2f}"),
    "x stock": ("decode_ratio", "{:.3f}"),
    "KV": ("kv_ratio", "{:.3f}"),
    "peak GiB": ("peak_bytes", "GiB"),
    "note": ("note", "{}"),
}


def _show(value: Any, style: str) -> str:
    if value is None:
        return ""
    if style == "GiB":
        return f"{value / 2**30:.2f}"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return style.format(value)
