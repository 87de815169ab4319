"""``ivcp bench throughput``: requests per second and time to first token under concurrent requests, pruned or not.

Each request is a picture, a question and an answer of fixed length. N concurrent requests are answered as one batch,
vision encoder to last token, and the next N follow: static batching, as `generate` does it. transformers' continuous
batching takes token ids without pictures, so neither arm can be measured there.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports.provenance import AGAIN
from ivcp_eval.reports.schema import canonical_json
from ivcp_eval.reports.stats.timing import STAGES, paired_ratio
from ivcp_eval.reports.terminal import time_cell
from ivcp_eval.reports.views.costs import BENCH_COLUMNS
from ivcp_eval.runs.planning.numbers import AMOUNT, COUNT, SHARE

CONCURRENCY = (1, 4, 12, 32)
SHOWN = {
    "variant": ("variant", "{}"),
    "requests/h": ("requests_per_hour", "{:.0f}"),
    "time of a request": ("end_to_end", "{}"),
    "first token ms": ("ttft_ms", "{:.1f}"),
    "time of the first token": ("first_token", "{}"),
    "vision ms": ("vision_ms", "{:.1f}"),
    "decode ms/token": ("decode_ms_per_token", "{:.2f}"),
    "KV MiB": ("kv_mib", "{:.1f}"),
    "peak GiB": ("peak_bytes", "GiB"),
    "note": ("note", "{}"),
}


@dataclass(frozen=True)
class Arm:
    """One variant. ``parameters``: of the method, as the user or a results file gave them."""

    method: str
    ratio: float
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``fastv(layer=3) 0.5``."""
        shown = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return "unpruned" if self.method == BASELINE else f"{self.method}{f'({shown})' * bool(shown)} {self.ratio:g}"


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


def answer(model: Any, inputs: Mapping[str, Any], arm: Arm, new_tokens: int) -> Answered:
    """One batch, every row ``new_tokens`` long."""
    from ivcp_eval.engine import prune
    from ivcp_eval.engine.cost.clock import phases, timed
    from ivcp_eval.interface.registry import adapter

    def generate() -> None:
        model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    with phases(model, adapter("qwen2_5_vl")) as measured, prune(model, arm.method, arm.ratio, **arm.parameters):
        seconds = timed(generate, model.device) / 1e3
    return Answered(
        seconds,
        measured.vision_ms or 0.0,
        measured.prefill_ms,
        measured.decode_ms_per_token or 0.0,
        measured.kv_bytes,
        measured.peak_bytes,
    )


def measure(
    model: Any, inputs: Mapping[str, Any], arms: Sequence[Arm], new_tokens: int, rounds: int, end: float
) -> list[dict[str, Any]]:
    """Rows of one concurrency: unpruned and every variant, round by round. Columns: `BENCH_COLUMNS`."""
    from ivcp_eval.engine.cost.rounds import Spread, interleave

    batch = int(inputs["input_ids"].shape[0])
    by_name = {arm.name: arm for arm in (Arm(BASELINE, 1.0), *arms)}
    calls = {name: partial(answer, model, inputs, arm, new_tokens) for name, arm in by_name.items()}
    found = interleave(calls, rounds, keep_going=lambda: time.monotonic() < end)
    rows = []
    for name, answers in found.items():

        def median(what: str, of: Sequence[Answered] = answers) -> float:
            return Spread.of([getattr(one, what) for one in of]).median

        rate = Spread.of([batch / one.seconds for one in answers]).median
        row: dict[str, Any] = {
            "variant": name,
            **_identity(by_name[name]),
            "rounds": len(answers),
            "requests_per_s": rate,
            "requests_per_hour": 3600 * rate,
            **{what: median(what) for what in ("ttft_ms", "vision_ms", "prefill_ms", "decode_ms_per_token")},
            "kv_bytes": answers[0].kv_bytes,
            "kv_mib": answers[0].kv_bytes / 2**20,
            "peak_bytes": answers[0].peak_bytes,
        }
        rows.append(row | _times(found["unpruned"], answers))
    return rows


def _identity(arm: Arm) -> dict[str, Any]:
    from ivcp_eval.interface.registry import make_method, parameters_of

    parameters = parameters_of(make_method(arm.method, arm.parameters))
    return {"method": arm.method, "method_parameters": canonical_json(parameters), "ratio": arm.ratio}


def _times(plain: Sequence[Answered], pruned: Sequence[Answered]) -> dict[str, Any]:
    """The columns of every stage's `TimeRatio`, paired by round; empty where a stage took no time."""
    fields = {
        "prefill": "prefill_ms",
        "first_token": "ttft_ms",
        "decode": "decode_ms_per_token",
        "end_to_end": "seconds",
    }
    row: dict[str, Any] = {}
    for stage in STAGES:
        before, after = (
            {str(n): t for n, one in enumerate(side) if (t := getattr(one, fields[stage])) > 0}
            for side in (plain, pruned)
        )
        time = paired_ratio(before, after)
        ends = {end: getattr(time, end) for end in ("ratio", "low", "high")}
        row |= {f"{stage}_{end}": None if math.isnan(value) else value for end, value in ends.items()}
        row[stage] = time_cell(time)
    return row


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """What is to be measured.

    Raises:
        ValueError: parameters for several methods; a results file without a pruned variant that runs here.
    """
    from ivcp_eval.interface.registry import make_method
    from ivcp_eval.interface.variants import parameter

    if options.of:
        return _arms_of_results(options.of)
    given = dict(parameter(text) for text in options.set)
    if given and len(options.methods) > 1:
        raise ValueError(f"--set is of one method, got {', '.join(options.methods)}; run the bench for each")
    for name in options.methods:
        make_method(name, given)  # a misspelt name shall not wait for the model
    return [Arm(name, ratio, given) for name in options.methods for ratio in options.ratios]


def _arms_of_results(path: Path) -> list[Arm]:
    """The pruned variants of a results CSV, each once, seeds aside."""
    from ivcp_eval.interface.registry import make_method
    from ivcp_eval.reports.table import read_results

    arms: dict[str, Arm] = {}
    for row in read_results(path):
        ratio = row["ratio_method"] if row["budget"] else row["ratio_asked"]
        if row["method"] in (BASELINE, AGAIN) or not ratio or row["served"]:
            continue
        parameters = json.loads(row["method_parameters"] or "{}")
        usual = json.loads(_identity(Arm(row["method"], ratio))["method_parameters"])
        own = {name: value for name, value in parameters.items() if usual.get(name) != value}
        make_method(row["method"], own)
        arm = Arm(row["method"], ratio, own)
        arms.setdefault(arm.name, arm)
    if not arms:
        raise ValueError(f"{path} has no pruned variant with a ratio that a model in this process was run at")
    return list(arms.values())


def parser() -> argparse.ArgumentParser:
    """Arguments of the bench."""
    made = argparse.ArgumentParser(prog="ivcp bench throughput", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--size", default="small", help="tiny, small or qwen25_7b (default: small)")
    made.add_argument("--config", type=Path, metavar="FOLDER", help="shape of the Qwen2.5-VL checkpoint there, of "
        "which only config.json is read")  # fmt: skip
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on cpu, bfloat16")
    made.add_argument("--attention", default="sdpa", help="default: %(default)s")
    made.add_argument("--threads", type=COUNT, help="CPU threads of torch; default: as torch finds it")
    made.add_argument("--tokens", type=COUNT, help="visual tokens of a request; default: the fewest of the size")
    made.add_argument("--concurrency", type=COUNT, nargs="+", default=list(CONCURRENCY), help="default: 1 4 12 32")
    made.add_argument("--new-tokens", type=COUNT, default=64, help="length of every answer (default: %(default)s)")
    made.add_argument("--methods", nargs="+", metavar="NAME", default=["ivc_prune"], help="default: ivc_prune")
    made.add_argument("--set", nargs="+", metavar="KEY=VALUE", default=[], help="parameters of the one method")
    made.add_argument("--ratios", type=SHARE, nargs="+", default=[0.5, 0.25], help="default: 0.5 0.25")
    made.add_argument("--of", type=Path, metavar="RESULTS", help="the variants of this results CSV in place of these; "
        "`ivcp report RESULTS --cost OUT.csv` then joins what they cost")  # fmt: skip
    made.add_argument("--rounds", type=COUNT, default=5, help="interleaved rounds (default: %(default)s)")
    made.add_argument("--cell-s", type=AMOUNT, default=120, help="start no round after that many seconds of a cell")
    made.add_argument("--out", type=Path, help="write OUT.csv and OUT.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench.

    Raises:
        ValueError: as `arms_of`.
    """
    options = parser().parse_args(arguments)
    import torch

    from ivcp_eval.lab.bench.models import build_model, configuration, make_inputs
    from ivcp_eval.lab.bench.models import size as find_size
    from ivcp_eval.lab.bench.report import Report, environment

    size = find_size(options.size)
    arms = arms_of(options)
    tokens = options.tokens or min(size.visual_tokens)
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    config = configuration(size) if options.config is None else _configuration(options.config)
    command = shlex.join(["ivcp", "bench", "throughput", *(sys.argv[1:] if arguments is None else arguments)])
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        before = environment(options.device, command)
        report = Report(options.out, before, sys.stdout, [column.name for column in BENCH_COLUMNS], SHOWN)
        model = build_model(config, options.device, dtype, options.attention)
        common = {
            "decoder": canonical_json(_decoder(config)),
            "quantised": "",
            "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
            "host": f"{before['processor']}, {before['threads']} thread(s)",
            "dtype": str(dtype).removeprefix("torch."),
            "torch_version": before["torch"],
            "transformers_version": before["transformers"],
            "attention": options.attention,
            "visual_tokens": tokens,
            "text_tokens": size.text_tokens,
            "new_tokens": options.new_tokens,
        }
        for batch in sorted(set(options.concurrency)):
            end = time.monotonic() + options.cell_s
            row = {**common, "batch": batch}
            try:
                inputs = make_inputs(model.config, tokens, batch, size.text_tokens, dtype, options.device)
                found = measure(model, inputs, arms, options.new_tokens, options.rounds, end)
                report.add([{**row, **one} for one in found])
            except torch.OutOfMemoryError as error:
                report.add([{**row, "note": f"out of memory: {str(error).splitlines()[0]}"}])
                torch.cuda.empty_cache()
    finally:
        torch.set_num_threads(threads)
    report.finish(environment(options.device, command))
    return 0


def _decoder(config: Any) -> dict[str, Any]:
    from ivcp_eval.engine.cost.flops import DecoderShape

    return asdict(DecoderShape.of(config.get_text_config()))


def _configuration(folder: Path) -> Any:
    """Of a checkpoint; ValueError where it is no Qwen2.5-VL, whose inputs alone the bench can make up."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"{folder} is a {config.model_type}; the bench makes up requests of qwen2_5_vl only")
    return config
