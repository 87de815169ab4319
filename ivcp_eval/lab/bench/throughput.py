"""``ivcp bench throughput``: requests per second and time to first token under concurrent requests, pruned or not.

Each request is a picture, a question and an answer of a given length. N clients send them, each the next one when its
answer is there; the server answers all who wait as one batch, from pixels to last token, and then looks who waits
(`load.closed_loop`). transformers' continuous batching takes token ids without pictures, so neither arm can run there.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ivcp_eval.interface.models import QUANTISED
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.lab.bench.load import Trace, closed_loop, lengths, steady
from ivcp_eval.reports.provenance import AGAIN
from ivcp_eval.reports.schema import canonical_json
from ivcp_eval.reports.stats.timing import paired_ratio
from ivcp_eval.reports.terminal import time_cell
from ivcp_eval.reports.views.costs import BENCH_COLUMNS
from ivcp_eval.runs.planning.numbers import AMOUNT, COUNT, SHARE, Number
from ivcp_eval.runs.planning.placement import quantiser

if TYPE_CHECKING:
    from ivcp_eval.engine.cost.clock import Phases
    from ivcp_eval.engine.cost.traffic import Traffic

CONCURRENCY = (1, 4, 12, 32)
MOST_REQUESTS = 1000  # of a round whose times are written one by one
SHOWN = {
    "variant": ("variant", "{}"),
    "requests/h": ("requests_per_hour", "{:.0f}"),
    "time of a request": ("end_to_end", "{}"),
    "first token p50 ms": ("ttft_p50_ms", "{:.1f}"),
    "p95 ms": ("ttft_p95_ms", "{:.1f}"),
    "time of p50": ("ttft_p50", "{}"),
    "of p95": ("ttft_p95", "{}"),
    "of a batch ms": ("ttft_ms", "{:.1f}"),
    "time of it": ("first_token", "{}"),
    "vision ms": ("vision_ms", "{:.1f}"),
    "prefill ms": ("prefill_ms", "{:.1f}"),
    "memory alone ms": ("prefill_memory_ms", "{:.2f}"),
    "decode ms/token": ("decode_ms_per_token", "{:.2f}"),
    "memory alone": ("decode_memory_ms", "{:.2f}"),
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
    def share(self) -> float:
        """Of the picture that it is given: less than 1 where the method saves by shrinking it."""
        from ivcp_eval.interface.registry import make_method

        return make_method(self.method, self.parameters).pixel_share(self.ratio) or 1.0

    @property
    def name(self) -> str:
        """``fastv(layer=3) 0.5``."""
        shown = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return "unpruned" if self.method == BASELINE else f"{self.method}{f'({shown})' * bool(shown)} {self.ratio:g}"


@dataclass(frozen=True)
class Workload:
    """What the clients ask, the same of every variant.

    Attributes:
        inputs: of ``generate``, a row for each client. lengths: tokens of each answer, clients in turn.
        most: requests in a batch.
    """

    inputs: Mapping[str, Any]
    lengths: Sequence[int]
    most: int

    @property
    def clients(self) -> int:
        """Requests under way at a time."""
        return int(self.inputs["input_ids"].shape[0])

    def rows(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The inputs of some requests of different clients, whose pictures are all of one size."""
        clients = [number % self.clients for number in numbers]
        patches = self.inputs["pixel_values"].shape[0] // self.clients
        own = {name: tensor[clients] for name, tensor in self.inputs.items() if name != "pixel_values"}
        pixels = self.inputs["pixel_values"].unflatten(0, (self.clients, patches))
        return {**own, "pixel_values": pixels[clients].flatten(0, 1)}


@dataclass(frozen=True)
class Answered:
    """All requests of a workload, answered once.

    Attributes:
        traces: of every request. phases: of every batch.
    """

    traces: Sequence[Trace]
    clients: int
    phases: Sequence[Phases]

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(one.last for one in self.traces) - min(one.sent for one in self.traces)

    def ttft(self, percent: float) -> float:
        """A percentile of the milliseconds to the first token, waiting included."""
        return float(np.percentile([one.ttft_ms for one in steady(self.traces, self.clients)], percent))

    def of_a_batch(self, what: Callable[[Phases], float | None]) -> float:
        """The median over batches."""
        return statistics.median(what(one) or 0.0 for one in self.phases)


def _batch_ttft(one: Phases) -> float:
    """Vision encoder and prefill: from the beginning of a batch until its first tokens are there."""
    return (one.vision_ms or 0.0) + one.prefill_ms


def answer(model: Any, load: Workload, arm: Arm, cpu_time: bool = False) -> Answered:
    """The whole workload under one variant; ``cpu_time`` as in `phases`."""
    import torch

    from ivcp_eval.engine import prune
    from ivcp_eval.engine.cost.clock import phases
    from ivcp_eval.interface.registry import adapter

    wired, measured = adapter("qwen2_5_vl"), []

    def seconds() -> float:
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        return time.process_time() if cpu_time else time.perf_counter()

    def batch(numbers: Sequence[int]) -> list[tuple[float, float]]:
        wanted, came = torch.tensor([load.lengths[number] for number in numbers], device=model.device), list[float]()

        def ended(*_: Any, **__: Any) -> Any:
            came.append(seconds())  # `generate` waits for the device at every step anyway
            return wanted <= len(came)

        longest = int(wanted.max())
        with phases(model, wired, cpu_time=cpu_time) as one, prune(model, arm.method, arm.ratio, **arm.parameters):
            model.generate(**load.rows(numbers), max_new_tokens=longest, do_sample=False, stopping_criteria=[ended])
        measured.append(one)
        return [(came[0], came[length - 1]) for length in wanted.tolist()]

    each = len(load.lengths) // load.clients
    traces = closed_loop(load.clients, each, load.most, batch, seconds)
    return Answered(traces, load.clients, measured)


def read_answered(found: Mapping[str, Any]) -> Answered:
    """Of its JSON."""
    from ivcp_eval.engine.cost.clock import Phases

    traces, batches = [Trace(**one) for one in found["traces"]], [Phases(**one) for one in found["phases"]]
    return Answered(traces, found["clients"], batches)


def measure(
    model: Any,
    loads: Mapping[float, Workload],
    arms: Sequence[Arm],
    rounds: int,
    seconds: float,
    traffic: Traffic,
    kept: MutableMapping[tuple[str, int], tuple[float, Answered]] | None = None,
    cpu_time: bool = False,
) -> list[dict[str, Any]]:
    """Rows of one concurrency: unpruned and every variant, round by round. Columns: `BENCH_COLUMNS`.

    Args:
        loads: share of the picture that a variant is given -> its requests; 1 is the whole. seconds, kept: of
            `interleave`. cpu_time: of `answer`.
    """
    from ivcp_eval.engine.cost.rounds import Spread, interleave

    by_name = {arm.name: arm for arm in (Arm(BASELINE, 1.0), *arms)}
    calls = {name: partial(answer, model, loads[arm.share], arm, cpu_time) for name, arm in by_name.items()}
    found = interleave(calls, rounds, seconds=seconds, kept=kept)
    load, rows = loads[1.0], []
    for name, answers in found.items():
        rates = [len(load.lengths) / one.seconds for one in answers]
        every = [trace.ttft_ms for one in answers for trace in steady(one.traces, load.clients)]
        row: dict[str, Any] = {
            "variant": name,
            **_identity(by_name[name]),
            "rounds": len(answers),
            "requests": len(load.lengths),
            "most_in_batch": min(load.most, load.clients),
            "requests_per_s": Spread.of(rates).median,
            "requests_per_hour": 3600 * Spread.of(rates).median,
            **{f"ttft_p{percent}_ms": float(np.percentile(every, percent)) for percent in (50, 95)},
            **{what: Spread.of([one.of_a_batch(of) for one in answers]).median for what, of in _OF_A_BATCH.items()},
            "kv_bytes": max(one.kv_bytes for one in answers[0].phases),
            "peak_bytes": max(one.peak_bytes or 0 for one in answers[0].phases) or None,
            "requests_per_s_rounds": rates,
            **{f"{stage}_rounds": [of(one) for one in answers] for stage, of in _TIMES.items()},
            "requests_ms_rounds": [_requests_ms(one) for one in answers],
        }
        row["kv_mib"] = row["kv_bytes"] / 2**20
        row["prefill_memory_ms"] = traffic.prefill_ms(row["kv_bytes"])
        row["decode_memory_ms"] = traffic.decode_ms(row["kv_bytes"])
        rows.append(row | _times(found["unpruned"], answers))
    return rows


def _requests_ms(one: Answered) -> list[list[float]]:
    """Of each request when it was sent and when its first and last token came, after the first of all was sent."""
    began = min(trace.sent for trace in one.traces)
    return [[round(1e3 * (at - began), 3) for at in (t.sent, t.first, t.last)] for t in one.traces[:MOST_REQUESTS]]


_OF_A_BATCH: dict[str, Callable[[Phases], float | None]] = {
    "ttft_ms": _batch_ttft,
    "vision_ms": lambda one: one.vision_ms,
    "prefill_ms": lambda one: one.prefill_ms,
    "decode_ms_per_token": lambda one: one.decode_ms_per_token,
}
#: Stage -> its time in one round.
_TIMES: dict[str, Callable[[Answered], float]] = {
    "prefill": lambda one: one.of_a_batch(_OF_A_BATCH["prefill_ms"]),
    "first_token": lambda one: one.of_a_batch(_batch_ttft),
    "decode": lambda one: one.of_a_batch(_OF_A_BATCH["decode_ms_per_token"]),
    "end_to_end": lambda one: one.seconds,
    "ttft_p50": lambda one: one.ttft(50),
    "ttft_p95": lambda one: one.ttft(95),
}


def _identity(arm: Arm) -> dict[str, Any]:
    from ivcp_eval.interface.registry import make_method, parameters_of

    parameters = parameters_of(make_method(arm.method, arm.parameters))
    return {"method": arm.method, "method_parameters": canonical_json(parameters), "ratio": arm.ratio}


def _times(plain: Sequence[Answered], pruned: Sequence[Answered]) -> dict[str, Any]:
    """The columns of every stage's `TimeRatio`, paired by round; empty where a stage took no time."""
    row: dict[str, Any] = {}
    for stage, of in _TIMES.items():
        before, after = ({str(n): t for n, one in enumerate(side) if (t := of(one)) > 0} for side in (plain, pruned))
        time = paired_ratio(before, after)
        ends = {end: getattr(time, end) for end in ("ratio", "low", "high")}
        row |= {f"{stage}_{end}": None if math.isnan(value) else value for end, value in ends.items()}
        row[stage] = time_cell(time)
    return row


def arms_of(options: argparse.Namespace) -> tuple[list[Arm], list[dict[str, Any]]]:
    """What is to be measured, and rows of what cannot be.

    Raises:
        ValueError: parameters for several methods; a results file without a pruned variant that runs here.
    """
    from ivcp_eval.interface.registry import make_method, read_parameters
    from ivcp_eval.interface.variants import parameter

    if options.of:
        return _arms_of_results(options.of)
    given = dict(parameter(text) for text in options.set)
    if given and len(options.methods) > 1:
        raise ValueError(f"--set is of one method, got {', '.join(options.methods)}; run the bench for each")
    for name in options.methods:
        make_method(name, given)  # a misspelt name shall not wait for the model
    arms = [Arm(name, ratio, read_parameters(name, given)) for name in options.methods for ratio in options.ratios]
    return arms, []


def _arms_of_results(path: Path) -> tuple[list[Arm], list[dict[str, Any]]]:
    """The pruned variants of a results CSV, each once, seeds aside; and rows of those that no method here is."""
    from ivcp_eval.interface.registry import make_method, settable
    from ivcp_eval.reports.table import read_results

    arms: dict[str, Arm] = {}
    left_out: dict[str, dict[str, Any]] = {}
    for row in read_results(path):
        ratio = row["ratio_method"] if row["budget"] else row["ratio_asked"]
        if row["method"] in (BASELINE, AGAIN) or not ratio or row["served"]:
            continue
        recorded = json.loads(row["method_parameters"] or "{}")
        try:
            usual = settable(json.loads(_identity(Arm(row["method"], ratio))["method_parameters"]))
            own = {name: value for name, value in settable(recorded).items() if usual.get(name) != value}
            make_method(row["method"], own)
            if new := [name for name in usual if name not in settable(recorded)]:
                raise ValueError(f"{row['method']} has a parameter {', '.join(new)} now, of which {path} says nothing")
        except (ValueError, OSError) as error:
            arm = Arm(row["method"], ratio, recorded)
            said = {"method": arm.method, "method_parameters": canonical_json(recorded), "ratio": ratio}
            left_out.setdefault(arm.name, {"variant": arm.name, **said, "note": f"left out: {error}"})
            continue
        arm = Arm(row["method"], ratio, own)
        arms.setdefault(arm.name, arm)
    if not arms:
        reasons = "".join(f"\n  {row['variant']}: {row['note']}" for row in left_out.values())
        raise ValueError(f"{path} has no pruned variant with a ratio that a model in this process was run at{reasons}")
    return list(arms.values()), list(left_out.values())


def usable(model: Any, arms: Sequence[Arm]) -> tuple[list[Arm], list[dict[str, Any]]]:
    """Those that can run on the model, and rows that say why others cannot."""
    from ivcp_eval.engine import resolve

    able, rows = [], []
    for arm in arms:
        try:
            resolve(model, arm.method, arm.ratio, None, arm.parameters)
            able.append(arm)
        except (ValueError, OSError) as error:
            rows.append({"variant": arm.name, **_identity(arm), "note": f"left out: {error}"})
    return able, rows


def parser() -> argparse.ArgumentParser:
    """Arguments of the bench."""
    made = argparse.ArgumentParser(prog="ivcp bench throughput", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--size", default="small", help="tiny, small or qwen25_7b (default: small)")
    made.add_argument("--config", type=Path, metavar="FOLDER", help="shape of the Qwen2.5-VL checkpoint there, of "
        "which only config.json is read")  # fmt: skip
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on cpu, bfloat16")
    made.add_argument("--attention", default="sdpa", help="default: %(default)s")
    made.add_argument("--weights", choices=tuple(QUANTISED), default="", help="store the weights so; bnb8 and bnb4 on "
        "a GPU (default: as they are)")  # fmt: skip
    made.add_argument("--threads", type=COUNT, help="CPU threads of torch; default: as torch finds it")
    made.add_argument("--cpu-time", action="store_true", help="processor time, not elapsed time (shared machines)")
    made.add_argument("--host", metavar="NAME", help="written in place of the processor's name")
    made.add_argument("--tokens", type=COUNT, help="visual tokens of a request; default: the fewest of the size")
    made.add_argument("--concurrency", type=COUNT, nargs="+", default=list(CONCURRENCY), help="clients that each have "
        "one request under way (default: 1 4 12 32)")  # fmt: skip
    made.add_argument("--each", type=COUNT, default=3, help="requests of a client, one after the other (default: 3)")
    made.add_argument("--most", type=COUNT, help="requests in a batch; default: all that wait")
    made.add_argument("--new-tokens", type=COUNT, default=64, help="mean length of answers (default: %(default)s)")
    made.add_argument("--spread", type=Number(float, high=1, above=False), default=0.5, help="how far answers are "
        "shorter or longer than that, as a share of it; 0: all are as long (default: %(default)s)")  # fmt: skip
    made.add_argument("--methods", nargs="+", metavar="NAME", default=["ivc_prune"], help="default: ivc_prune")
    made.add_argument("--set", nargs="+", metavar="KEY=VALUE", default=[], help="parameters of the one method")
    made.add_argument("--ratios", type=SHARE, nargs="+", default=[0.5, 0.25], help="default: 0.5 0.25")
    made.add_argument("--of", type=Path, metavar="RESULTS", help="the variants of this results CSV in place of these; "
        "`ivcp report RESULTS --cost OUT.csv` then joins what they cost")  # fmt: skip
    made.add_argument("--rounds", type=COUNT, default=5, help="interleaved rounds (default: %(default)s)")
    made.add_argument("--cell-s", type=AMOUNT, default=120, help="start no round after that many seconds of a cell")
    made.add_argument("--resume", action="store_true", help="go on behind the calls that a run with the same options "
        "left in OUT.calls.jsonl")  # fmt: skip
    made.add_argument("--out", type=Path, help="write OUT.csv and OUT.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench.

    Raises:
        ValueError: as `arms_of` and `quantiser`.
    """
    options = parser().parse_args(arguments)
    import torch

    from ivcp_eval.engine.cost.traffic import Traffic, copy_bandwidth
    from ivcp_eval.interface.ops import budget
    from ivcp_eval.interface.registry import adapter
    from ivcp_eval.lab.bench.kept import opened
    from ivcp_eval.lab.bench.models import build_model, configuration, make_inputs
    from ivcp_eval.lab.bench.models import size as find_size
    from ivcp_eval.lab.bench.report import Report, environment

    size = find_size(options.size)
    arms, left_out = arms_of(options)
    stored = f"{options.weights} {quantiser(options.weights, options.device)}" if options.weights else ""
    tokens = options.tokens or min(size.visual_tokens)
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    config = configuration(size) if options.config is None else _configuration(options.config)
    command = shlex.join(["ivcp", "bench", "throughput", *(sys.argv[1:] if arguments is None else arguments)])
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        before = environment(options.device, command)
        before["processor"] = options.host or before["processor"]
        report = Report(options.out, before, sys.stdout, [column.name for column in BENCH_COLUMNS], SHOWN)
        model = build_model(config, options.device, dtype, options.attention, options.weights)
        arms, unable = usable(model, arms)
        calls = opened(options, before)
        traffic = Traffic.of(model, adapter("qwen2_5_vl"), copy_bandwidth(options.device, cpu_time=options.cpu_time))
        common = {
            "decoder": canonical_json(_decoder(config)),
            "quantised": stored,
            "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
            "host": f"{before['processor']}, {before['threads']} thread(s){', processor time' * options.cpu_time}",
            "dtype": str(dtype).removeprefix("torch."),
            "torch_version": before["torch"],
            "transformers_version": before["transformers"],
            "attention": options.attention,
            "visual_tokens": tokens,
            "text_tokens": size.text_tokens,
            "new_tokens": options.new_tokens,
            "spread": options.spread,
            "bandwidth_gb_s": traffic.bandwidth / 1e9,
        }
        if left_out := [*left_out, *unable]:
            report.add([{**common, **row} for row in left_out])
        for clients in sorted(set(options.concurrency)):
            row = {**common, "batch": clients}
            try:
                wanted = lengths(clients * options.each, options.new_tokens, options.spread)
                loads = {}
                for share in {1.0, *(arm.share for arm in arms)}:
                    shown = budget(share, tokens)
                    inputs = make_inputs(model.config, shown, clients, size.text_tokens, dtype, options.device)
                    loads[share] = Workload(inputs, wanted, options.most or clients)
                kept = calls.cell(f"{clients} clients", read_answered)
                found = measure(model, loads, arms, options.rounds, options.cell_s, traffic, kept, options.cpu_time)
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
