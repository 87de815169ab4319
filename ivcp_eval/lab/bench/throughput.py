"""``ivcp bench throughput``: requests per second and time to first token under concurrent requests, pruned or not.

Each request is a picture, a question and an answer of fixed length. N concurrent requests are answered as one batch,
vision encoder to last token, and the next N follow: static batching, as `generate` does it. transformers' continuous
batching takes token ids without pictures, so neither arm can be measured there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ivcp_eval.runs.planning.numbers import AMOUNT, COUNT, SHARE

CONCURRENCY = (1, 4, 12, 32)
COLUMNS = (
    "attention",
    "visual_tokens",
    "text_tokens",
    "new_tokens",
    "batch",
    "variant",
    "ratio",
    "rounds",
    "requests_per_s",
    "requests_q1",
    "requests_q3",
    "requests_ratio",
    "requests_ratio_q1",
    "requests_ratio_q3",
    "ttft_ms",
    "ttft_ratio",
    "vision_ms",
    "prefill_ms",
    "decode_ms_per_token",
    "kv_bytes",
    "peak_bytes",
    "note",
)
SHOWN = {
    "variant": ("variant", "{}"),
    "requests/s": ("requests_per_s", "{:.3f}"),
    "x unpruned": ("requests_ratio", "{:.3f}"),
    "q1": ("requests_ratio_q1", "{:.3f}"),
    "q3": ("requests_ratio_q3", "{:.3f}"),
    "first token ms": ("ttft_ms", "{:.1f}"),
    "x unpruned (first)": ("ttft_ratio", "{:.3f}"),
    "vision ms": ("vision_ms", "{:.1f}"),
    "decode ms/token": ("decode_ms_per_token", "{:.2f}"),
    "peak GiB": ("peak_bytes", "GiB"),
    "note": ("note", "{}"),
}


@dataclass(frozen=True)
class Answered:
    """One batch of requests: seconds from pixels to the last token, and milliseconds of its parts."""

    seconds: float
    vision_ms: float
    prefill_ms: float
    decode_ms_per_token: float
    kv_bytes: int
    peak_bytes: int | None

    @property
    def ttft_ms(self) -> float:
        """Vision encoder and prefill: when the batch's first tokens are there."""
        return self.vision_ms + self.prefill_ms


def answer(model: Any, inputs: Mapping[str, Any], method: str, ratio: float, new_tokens: int) -> Answered:
    """One batch, every row ``new_tokens`` long."""
    from ivcp_eval.engine import prune
    from ivcp_eval.engine.cost.clock import phases, timed
    from ivcp_eval.interface.registry import adapter

    def generate() -> None:
        model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    with phases(model, adapter("qwen2_5_vl")) as measured, prune(model, method, ratio):
        seconds = timed(generate, model.device) / 1e3
    return Answered(
        seconds,
        measured.vision_ms or 0.0,
        measured.prefill_ms,
        measured.decode_ms_per_token or 0.0,
        measured.kv_bytes,
        measured.peak_bytes,
    )


def measure(model: Any, inputs: Mapping[str, Any], options: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    """Rows of one concurrency: unpruned and every ratio, round by round."""
    from ivcp_eval.engine.cost.rounds import Spread, interleave

    batch = int(inputs["input_ids"].shape[0])
    arms = {"unpruned": ("none", 1.0)}
    arms |= {f"{options.method} {ratio:g}": (options.method, ratio) for ratio in options.ratios}
    calls = {
        name: partial(answer, model, inputs, method, ratio, options.new_tokens)
        for name, (method, ratio) in arms.items()
    }
    rounds = interleave(calls, options.rounds, keep_going=lambda: time.monotonic() < end)
    plain, rows = rounds["unpruned"], []
    for name, answers in rounds.items():
        rate = Spread.of([batch / a.seconds for a in answers])
        gain = Spread.of_ratios([p.seconds for p in plain], [a.seconds for a in answers])
        first = Spread.of_ratios([a.ttft_ms for a in answers], [p.ttft_ms for p in plain])
        rows.append(
            {
                "variant": name,
                "ratio": arms[name][1],
                "rounds": rate.n,
                "requests_per_s": rate.median,
                "requests_q1": rate.q1,
                "requests_q3": rate.q3,
                "requests_ratio": gain.median,
                "requests_ratio_q1": gain.q1,
                "requests_ratio_q3": gain.q3,
                "ttft_ms": Spread.of([a.ttft_ms for a in answers]).median,
                "ttft_ratio": first.median,
                "vision_ms": Spread.of([a.vision_ms for a in answers]).median,
                "prefill_ms": Spread.of([a.prefill_ms for a in answers]).median,
                "decode_ms_per_token": Spread.of([a.decode_ms_per_token for a in answers]).median,
                "kv_bytes": answers[0].kv_bytes,
                "peak_bytes": answers[0].peak_bytes,
            }
        )
    return rows


def parser() -> argparse.ArgumentParser:
    """Arguments of the bench."""
    made = argparse.ArgumentParser(prog="ivcp bench throughput", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--size", default="small", help="tiny, small or qwen25_7b (default: small)")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on cpu, bfloat16")
    made.add_argument("--attention", default="sdpa", help="default: %(default)s")
    made.add_argument("--tokens", type=COUNT, help="visual tokens of a request; default: the fewest of the size")
    made.add_argument("--concurrency", type=COUNT, nargs="+", default=list(CONCURRENCY), help="default: 1 4 12 32")
    made.add_argument("--new-tokens", type=COUNT, default=64, help="length of every answer (default: %(default)s)")
    made.add_argument("--method", default="ivc_prune", help="default: %(default)s")
    made.add_argument("--ratios", type=SHARE, nargs="+", default=[0.5, 0.25], help="default: 0.5 0.25")
    made.add_argument("--rounds", type=COUNT, default=5, help="interleaved rounds (default: %(default)s)")
    made.add_argument("--cell-s", type=AMOUNT, default=120, help="start no round after that many seconds of a cell")
    made.add_argument("--out", type=Path, help="write OUT.csv and OUT.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench.

    Raises:
        ValueError: a number below 1.
    """
    options = parser().parse_args(arguments)
    import torch

    from ivcp_eval.interface.registry import make_method
    from ivcp_eval.lab.bench.models import build_model, configuration, make_inputs
    from ivcp_eval.lab.bench.models import size as find_size
    from ivcp_eval.lab.bench.report import Report, environment

    size = find_size(options.size)
    make_method(options.method)  # a misspelt name shall not wait for the model
    tokens = options.tokens or min(size.visual_tokens)
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    command = shlex.join(["ivcp", "bench", "throughput", *(sys.argv[1:] if arguments is None else arguments)])
    report = Report(options.out, environment(options.device, command), sys.stdout, COLUMNS, SHOWN)
    model = build_model(configuration(size), options.device, dtype, options.attention)
    common = {
        "attention": options.attention,
        "visual_tokens": tokens,
        "text_tokens": size.text_tokens,
        "new_tokens": options.new_tokens,
    }
    for batch in sorted(options.concurrency):
        end = time.monotonic() + options.cell_s
        row = {**common, "batch": batch}
        try:
            inputs = make_inputs(model.config, tokens, batch, size.text_tokens, dtype, options.device)
            report.add([{**row, **found} for found in measure(model, inputs, options, end)])
        except torch.OutOfMemoryError as error:
            report.add([{**row, "note": f"out of memory: {str(error).splitlines()[0]}"}])
            torch.cuda.empty_cache()
    report.finish(environment(options.device, command))
    return 0
