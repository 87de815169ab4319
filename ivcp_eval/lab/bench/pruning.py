"""What pruning costs and saves: untouched, ratio 1 and pruned models side by side, beside the bound of the cut.

``ivcp bench --size small`` (CPU, a minute) or ``--size qwen25_7b --device cuda``. Weights are
random: only speed and memory are measured. How to read the table: docs/bench.md.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.runs.planning.numbers import AMOUNT, COUNT

if TYPE_CHECKING:
    from ivcp_eval.engine.cost.clock import HookTime, Phases
    from ivcp_eval.engine.cost.traffic import Traffic
    from ivcp_eval.lab.bench.kept import Calls
    from ivcp_eval.lab.bench.models import Size
    from ivcp_eval.lab.bench.report import Report

METHOD = "ivc_prune"
MAX_OVERHEAD = 0.03  # of ratio 1 over the untouched model
MAX_OVER_BOUND = 0.05  # of a pruned prefill over the FLOP bound of its cut
#: Prompts of more tokens (all rows) than this are not warmed up: they take seconds, their first-call costs do not.
WARM_UP_TOKENS = 50_000


@dataclass(frozen=True)
class Variant:
    """One thing that is timed: ``ratio`` None is the model without any hook of the engine."""

    name: str
    ratio: float | None = None
    layer: int | None = None
    visual_tokens: int | None = None  # a shorter prompt, of which the layer bound is made


@dataclass
class Sample:
    """One generate call of one variant."""

    phases: Phases
    cut: HookTime
    tokens_per_layer: list[int]


@dataclass(frozen=True)
class Setup:
    """What all cells of one run share."""

    model: Any
    adapter: Any
    size: Size
    device: str
    attention: str
    dtype: Any
    cpu_time: bool = False
    traffic: Traffic | None = None


def variants(size: Size, visual_tokens: int) -> list[Variant]:
    """Everything timed in one cell; the untouched model first, shorter prompts last."""
    from ivcp_eval.interface.ops import budget

    cuts = [Variant(f"{ratio:g} @ layer {layer}", ratio, layer) for ratio, layer in size.cuts]
    shorter = sorted({budget(ratio, visual_tokens) for ratio, _ in size.cuts}, reverse=True)
    return [
        Variant("untouched"),
        Variant("ratio 1", 1.0),
        *cuts,
        *(Variant(f"untouched, {n} visual", visual_tokens=n) for n in shorter),
    ]


def _run_once(setup: Setup, inputs: dict[str, Any], variant: Variant) -> Sample:
    from ivcp_eval.engine import prune
    from ivcp_eval.engine.cost import clock

    text = setup.adapter.text_model(setup.model)
    text_tokens = setup.size.text_tokens
    steps = 1 if variant.visual_tokens else setup.size.new_tokens
    per_layer = [inputs["input_ids"].shape[1]] * len(text.layers)
    cut = clock.HookTime()
    with contextlib.ExitStack() as stack:
        if variant.ratio is not None:
            parameters: dict[str, Any] = {} if variant.layer is None else {"layer": variant.layer}
            run = stack.enter_context(prune(setup.model, METHOD, variant.ratio, **parameters))
        if variant.layer is not None:
            cut = stack.enter_context(clock.hook_time(text.layers[variant.layer], cpu_time=setup.cpu_time))
        phases = stack.enter_context(clock.phases(setup.model, setup.adapter, cpu_time=setup.cpu_time))
        setup.model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    if variant.ratio is not None:
        per_layer = [max(rows) + text_tokens for rows in run.visual_per_layer]
    return Sample(phases, cut, per_layer)


def measure_cell(setup: Setup, visual_tokens: int, batch: int, seconds: float, calls: Calls) -> list[dict[str, Any]]:
    """Rows of one (visual tokens, batch): every variant, interleaved, for ``seconds`` or all rounds."""
    from ivcp_eval.engine.cost.rounds import interleave
    from ivcp_eval.lab.bench.models import make_inputs

    every = variants(setup.size, visual_tokens)
    make = partial(make_inputs, setup.model.config, batch=batch, text_tokens=setup.size.text_tokens)
    lengths = {v.visual_tokens or visual_tokens for v in every}
    inputs = {n: make(n, dtype=setup.dtype, device=setup.device) for n in lengths}
    run = {v.name: partial(_run_once, setup, inputs[v.visual_tokens or visual_tokens], v) for v in every}
    warmup = 1 if visual_tokens * batch <= WARM_UP_TOKENS else 0
    kept = calls.cell(f"{setup.attention} {visual_tokens} {batch}", _sample)
    samples = interleave(run, setup.size.rounds, warmup, seconds, kept)
    common = {
        "attention": setup.attention,
        "visual_tokens": visual_tokens,
        "text_tokens": setup.size.text_tokens,
        "batch": batch,
    }
    return [{**common, **_row(setup, v, visual_tokens, samples)} for v in every]


def _sample(found: Mapping[str, Any]) -> Sample:
    from ivcp_eval.engine.cost.clock import HookTime, Phases

    return Sample(Phases(**found["phases"]), HookTime(**found["cut"]), found["tokens_per_layer"])


def _row(setup: Setup, variant: Variant, visual_tokens: int, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    from ivcp_eval.engine.cost.rounds import Spread
    from ivcp_eval.interface.ops import budget

    def prefills(name: str) -> list[float]:
        return [sample.phases.prefill_ms for sample in samples[name]]

    mine, stock = samples[variant.name], samples["untouched"]
    prefill = Spread.of(prefills(variant.name))
    ratio = Spread.of_ratios(prefills(variant.name), prefills("untouched"))
    row: dict[str, Any] = {
        "variant": variant.name,
        "ratio": variant.ratio,
        "layer": variant.layer,
        "rounds": prefill.n,
        "prefill_ms": prefill.median,
        "prefill_q1": prefill.q1,
        "prefill_q3": prefill.q3,
        "prefill_ratio": ratio.median,
        "kv_bytes": mine[0].phases.kv_bytes,
        "kv_ratio": mine[0].phases.kv_bytes / stock[0].phases.kv_bytes,
        "peak_bytes": mine[0].phases.peak_bytes,
        "prefill_ms_rounds": prefills(variant.name),
    }
    if setup.traffic is not None:
        row["prefill_memory_ms"] = setup.traffic.prefill_ms(row["kv_bytes"])
        row["bandwidth_gb_s"] = setup.traffic.bandwidth / 1e9
    if variant.visual_tokens is None:
        decode = [sample.phases.decode_ms_per_token or 0.0 for sample in mine]
        row["decode_ms_per_token"] = Spread.of(decode).median
        row["decode_ratio"] = Spread.of_ratios(decode, [s.phases.decode_ms_per_token or 0.0 for s in stock]).median
        row["decode_ms_rounds"] = decode
        if setup.traffic is not None:
            row["decode_memory_ms"] = setup.traffic.decode_ms(row["kv_bytes"])
    if variant.ratio is not None:
        row |= _against_bound(setup, mine[0], ratio.median, variant.ratio)
    if variant.layer is not None and variant.ratio is not None:
        n_layers = len(mine[0].tokens_per_layer)
        short = prefills(f"untouched, {budget(variant.ratio, visual_tokens)} visual")
        shares = [
            (variant.layer + (n_layers - variant.layer) * s / full) / n_layers
            for s, full in zip(short, prefills("untouched"), strict=True)
        ]
        row["layer_bound"] = Spread.of(shares).median
        row["cut_ms"] = Spread.of([sample.cut.ms[0] for sample in mine]).median
    return row


def _against_bound(setup: Setup, sample: Sample, measured: float, ratio: float) -> dict[str, Any]:
    from ivcp_eval.engine.cost.flops import DecoderShape

    shape = DecoderShape.of(setup.model.config.text_config)
    pruned = shape.prefill_flops(sample.tokens_per_layer)
    full = shape.prefill_flops([sample.tokens_per_layer[0]] * shape.layers)
    over = measured / (pruned / full) - 1
    allowed = MAX_OVERHEAD if ratio == 1 else MAX_OVER_BOUND
    return {"flop_bound": pruned / full, "over_bound": over, "target": allowed, "met": over <= allowed}


def measure_vision(
    size: Size, device: str, dtype: Any, attention: str, cells: Sequence[tuple[int, int]], calls: Calls
) -> Iterator[tuple[Callable[[], dict[str, Any]], dict[str, Any]]]:
    """One row per (visual tokens, batch): the whole vision tower, stock code, once (after a warm-up on the first)."""
    import torch

    from ivcp_eval.engine.cost.clock import Phases, phases
    from ivcp_eval.engine.cost.rounds import interleave
    from ivcp_eval.interface.registry import adapter
    from ivcp_eval.lab.bench.models import build_model, configuration, make_inputs

    model = build_model(configuration(size, layers=1), device, dtype, attention)

    def encode(tokens: int, batch: int) -> Phases:
        inputs = make_inputs(model.config, tokens, batch, size.text_tokens, dtype, device)
        with torch.inference_mode(), phases(model, adapter("qwen2_5_vl")) as measured:
            model.get_image_features(pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
        return measured

    def measure(tokens: int, batch: int) -> dict[str, Any]:
        kept = calls.cell(f"{attention} {tokens} {batch} vision", lambda found: Phases(**found))
        warmup = 1 if (tokens, batch) == cells[0] else 0
        (once,) = interleave({"encode": partial(encode, tokens, batch)}, 1, warmup, kept=kept)["encode"]
        row = {"variant": "vision encoder", "attention": attention, "visual_tokens": tokens, "batch": batch}
        return {**row, "rounds": 1, "vision_ms": once.vision_ms, "peak_bytes": once.peak_bytes}

    for tokens, batch in cells:
        yield partial(measure, tokens, batch), {"variant": "vision encoder", "visual_tokens": tokens, "batch": batch}


# -- one run --------------------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace, size: Size, report: Report, calls: Calls) -> None:
    """Every cell in order of size, what choosing costs, the vision tower; ``report`` gets rows as they are ready."""
    import torch

    from ivcp_eval.engine.cost.traffic import Traffic, copy_bandwidth
    from ivcp_eval.interface.registry import adapter, make_method, method_names
    from ivcp_eval.lab.bench.models import build_model, configuration
    from ivcp_eval.lab.bench.selection import measure_selection

    for name in options.methods or ():
        make_method(name)  # a misspelt name shall not wait for its turn
    dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    end = time.monotonic() + options.limit_s
    cells = sorted({(n, b) for n in size.visual_tokens for b in size.batches}, key=lambda cell: cell[0] * cell[1])

    def attempt(row: dict[str, Any], work: Callable[[], list[dict[str, Any]]]) -> None:
        if time.monotonic() > end:
            report.add([{**row, "note": f"skipped: --limit-s {options.limit_s:g} was reached"}])
            return
        try:
            report.add(work())
        except torch.OutOfMemoryError as error:
            report.add([{**row, "note": f"out of memory: {str(error).splitlines()[0]}"}])
        if options.device != "cpu":
            torch.cuda.empty_cache()

    for attention in _attentions(options.device, report.add):
        if not options.only_methods:
            # A vision tower without blocks: here it only has to deliver embeddings of the right shape.
            model = build_model(configuration(size, vision_depth=0), options.device, dtype, attention)
            wired = adapter("qwen2_5_vl")
            traffic = Traffic.of(model, wired, copy_bandwidth(options.device, cpu_time=options.cpu_time))
            setup = Setup(model, wired, size, options.device, attention, dtype, options.cpu_time, traffic)
            for tokens, batch in cells:
                row = {"attention": attention, "visual_tokens": tokens, "batch": batch}
                attempt(row, partial(measure_cell, setup, tokens, batch, options.cell_s, calls))
            del setup, model
        names = method_names() if options.methods is None else options.methods
        if names:  # methods may listen to the vision tower: here it is whole
            model = build_model(configuration(size), options.device, dtype, attention)
            setup = Setup(model, adapter("qwen2_5_vl"), size, options.device, attention, dtype, options.cpu_time)
            for tokens in sorted(set(size.visual_tokens)):
                batch = min(size.batches)
                row = {"attention": attention, "visual_tokens": tokens, "batch": batch, "variant": "selection"}
                attempt(
                    row, partial(measure_selection, setup, tokens, batch, options.cell_s, names, calls, report.keep)
                )
            del setup, model
        if not options.only_methods:
            for call, row in measure_vision(size, options.device, dtype, attention, cells, calls):
                attempt({**row, "attention": attention}, lambda call=call: [call()])  # type: ignore[misc]


def _attentions(device: str, report: Callable[[list[dict[str, Any]]], None]) -> list[str]:
    from transformers.utils import is_flash_attn_2_available

    if device == "cpu":
        return ["sdpa"]
    if is_flash_attn_2_available():
        return ["sdpa", "flash_attention_2"]
    report([{"attention": "flash_attention_2", "note": "flash_attn is not installed"}])
    return ["sdpa"]


#: Field of `Size` -> option that overrides it.
_OPTIONS = {"visual_tokens": "tokens", "batches": "batch", "rounds": "rounds", "new_tokens": "new_tokens"}


def parser() -> argparse.ArgumentParser:
    """Arguments of ``ivcp bench``."""
    parser = argparse.ArgumentParser(prog="ivcp bench", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", help="tiny, small or qwen25_7b (default: small)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on cpu, bfloat16")
    parser.add_argument("--tokens", type=COUNT, nargs="+", help="visual tokens per image; default: those of the size")
    parser.add_argument("--batch", type=COUNT, nargs="+", help="batch sizes; default: those of the size")
    parser.add_argument("--rounds", type=COUNT, help="interleaved rounds; default: those of the size")
    parser.add_argument("--new-tokens", type=COUNT, help="tokens to decode; default: those of the size")
    parser.add_argument("--methods", nargs="*", metavar="NAME", help="whose selection is timed; default: every method")
    parser.add_argument("--only-methods", action="store_true", help="time nothing but selection")
    parser.add_argument("--threads", type=COUNT, help="CPU threads of torch; default: as torch finds it")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not elapsed time (shared machines)")
    parser.add_argument("--cell-s", type=AMOUNT, default=120, help="start no round after that many seconds of a cell "
        "(of selection: methods have equal parts of them)")  # fmt: skip
    parser.add_argument("--limit-s", type=AMOUNT, default=3600, help="start no cell after that many seconds")
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.json")
    parser.add_argument("--resume", action="store_true", help="go on behind the calls that a run with the same options "
        "left in OUT.calls.jsonl")  # fmt: skip
    parser.add_argument("--note", help="recorded in OUT.json (the commit, say, where there is no git checkout)")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; 0, or 1 if ``--check`` found a missed target."""
    options = parser().parse_args(argv)
    import torch

    from ivcp_eval.lab.bench.kept import opened
    from ivcp_eval.lab.bench.models import size as find_size
    from ivcp_eval.lab.bench.report import Report, environment

    chosen = find_size(options.size)
    for name, option in _OPTIONS.items():
        value = getattr(options, option)
        if value is not None:
            chosen = replace(chosen, **{name: value})
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        command = " ".join(["ivcp bench", *(sys.argv[1:] if argv is None else argv)])
        before = {**environment(options.device, command), "note": options.note}
        report = Report(options.out, before, sys.stdout)
        measure_all(options, chosen, report, opened(options, before))
    finally:
        torch.set_num_threads(threads)
    report.finish(environment(options.device, command))
    return 1 if options.check and report.missed else 0
