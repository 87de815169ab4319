"""``ivcp bench fork``: many variants in one pass against one by one, in one process, side by side.

Rounds are interleaved and the median of the rounds' ratios is printed with its quartiles, beside the ratio of the
floating-point operations. Decoding several rows together reads the weights once, so the measured ratio may be higher.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ivcp_eval.files import write_json
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.planning.numbers import AMOUNT, COUNT

RATIOS = (1.0, 0.9, 0.75, 0.5, 0.35, 0.25, 0.1)
TARGET, CEILING = 3.0, 1.05  # of seven variants; where nothing can be shared


@dataclass(frozen=True)
class Case:
    """A model, a prompt and variants.

    Attributes:
        name: what is compared. model, inputs: of ``generate``. variants: all of them.
        new_tokens: decoded by every variant.
        target: least ratio of times, one by one over one pass; None states no target.
    """

    name: str
    model: Any
    inputs: Mapping[str, Any]
    variants: tuple[Variant, ...]
    new_tokens: int
    target: float | None


def seven(layer: int) -> tuple[Variant, ...]:
    """IVC-Prune at seven ratios; the first is the unpruned model."""
    return tuple(Variant("", "ivc_prune", ratio, {"layer": layer}) for ratio in RATIOS)


def mixed(layers: int) -> tuple[Variant, ...]:
    """The unpruned model and cuts at layers 0, 2, 8 and 16 of 28, scaled to the depth."""
    early, middle, late = (max(1, round(depth * layers / 28)) for depth in (2, 8, 16))
    return (
        Variant(""),
        Variant("", "random", 0.5, {"layer": 0}),
        Variant("", "fastv", 0.5, {"layer": early}),
        Variant("", "pyramiddrop", 0.3, {"depths": (middle / layers, late / layers)}),
        Variant("", "ivc_prune", 0.5, {"layer": late}),
        Variant("", "ivc_prune", 0.25, {"layer": late}),
    )


# -- floating-point operations --------------------------------------------------------------------------------------


def vision_flops(config: Any, patches: int) -> int:
    """Matrix products of a Qwen2.5-VL vision tower (windows of 112 pixels where a block has them) and its merger."""
    hidden, blocks = config.hidden_size, config.depth
    window = (config.window_size // config.patch_size) ** 2
    linear = 2 * patches * (4 * hidden**2 + 3 * hidden * config.intermediate_size)
    full = len([i for i in config.fullatt_block_indexes if i < blocks])
    pairs = patches * (full * patches + (blocks - full) * min(window, patches))
    merged = hidden * config.spatial_merge_size**2
    merger = 2 * (patches // config.spatial_merge_size**2) * (merged**2 + merged * config.out_hidden_size)
    return blocks * linear + 4 * pairs * hidden + merger


def flops(case: Case) -> tuple[float, float]:
    """(one by one, one pass) floating-point operations: vision, decoder prefill and decoding, vocabulary head too."""
    from ivcp_eval.engine import resolve
    from ivcp_eval.engine.cost.flops import DecoderShape

    config = case.model.config
    text = config.text_config
    shape = DecoderShape.of(text)
    rows, length = case.inputs["input_ids"].shape  # all alike: what one costs
    visual = int((case.inputs["input_ids"][0] == config.image_token_id).sum())
    other = length - visual
    vision = vision_flops(config.vision_config, int(case.inputs["pixel_values"].shape[0]) // rows)
    head = 2 * text.hidden_size * text.vocab_size

    def tokens(variant: Variant) -> tuple[list[int], int]:
        """Tokens per layer, and the layer of the first cut (all of them if there is none)."""
        cuts = resolve(case.model, variant.method, variant.ratio, None, variant.parameters).cuts
        counts = [visual] * shape.layers
        for cut in cuts:
            counts[cut.layer :] = [round(cut.ratio * visual)] * (shape.layers - cut.layer)
        return [count + other for count in counts], cuts[0].layer if cuts else shape.layers

    def decoding(counts: Sequence[int]) -> float:
        # One token more each: a step is the difference of two prefills (every layer keeps what it processed).
        step = shape.prefill_flops([n + 1 for n in counts]) - shape.prefill_flops(counts)
        return (case.new_tokens - 1) * step + case.new_tokens * head

    singles, passes, deepest = 0.0, float(vision), 0
    for variant in case.variants:
        counts, first = tokens(variant)
        singles += vision + shape.prefill_flops(counts) + decoding(counts)
        passes += sum(shape.layer_flops(n) for n in counts[first:]) + decoding(counts)
        deepest = max(deepest, first)
    return singles, passes + deepest * shape.layer_flops(visual + other)


# -- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """All variants answered once: how long it took, and of each variant a checksum of its tokens."""

    seconds: float
    tokens: list[str]


def measure(
    case: Case,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = math.inf,
    kept: MutableMapping[tuple[str, int], tuple[float, Timed]] | None = None,
) -> tuple[Any, float, int]:
    """(`Spread` of the rounds' ratios, milliseconds of one pass, variants whose tokens are those of their own run).

    Args:
        seconds, kept: of `interleave`.
    """
    import torch

    from ivcp_eval.engine.cost.rounds import Spread, interleave
    from ivcp_eval.engine.fork import fork

    def timed(exact: bool) -> Timed:
        _wait(case.model)
        start = clock()
        with torch.inference_mode():
            options: dict[str, Any] = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens}
            answers = fork(case.model, case.variants, case.inputs, exact=exact, **options)
        _wait(case.model)
        took = clock() - start
        tokens = [json.dumps([row.tolist() for row in answer.tokens]) for answer in answers]
        return Timed(took, [hashlib.sha256(text.encode()).hexdigest()[:16] for text in tokens])

    calls = {"one by one": lambda: timed(exact=True), "one pass": lambda: timed(exact=False)}
    found = interleave(calls, rounds, seconds=seconds, kept=kept)
    one, together = found["one by one"], found["one pass"]
    equal = sum(mine == its for mine, its in zip(one[-1].tokens, together[-1].tokens, strict=True))
    times = [[each.seconds for each in side] for side in (one, together)]
    return Spread.of_ratios(*times), Spread.of(times[1]).median * 1e3, equal


def _wait(model: Any) -> None:
    import torch

    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


# -- cases ----------------------------------------------------------------------------------------------------------


def cases(size: str, device: str, dtype: str, folder: Path, rows: int = 1) -> list[Case]:
    """All comparisons on a batch of ``rows``: a random Qwen2.5-VL of a size, then the embedded model."""
    import torch

    from ivcp_eval.lab.bench.models import build_model, make_inputs
    from ivcp_eval.lab.bench.models import size as find_size

    if size == "mid":
        shape, tokens, config = _mid()
    else:
        from ivcp_eval.lab.bench.models import configuration

        shape = find_size(size)
        tokens, config = shape.visual_tokens[0], configuration(shape)
    kind = getattr(torch, dtype)
    model = build_model(config, device, kind, "sdpa")
    layers = config.text_config.num_hidden_layers
    inputs = make_inputs(config, tokens, rows, shape.text_tokens, kind, device)
    late = max(1, round(16 * layers / 28))
    listed = [
        Case(f"seven ratios, cut at {late} of {layers}, {new} new tokens", model, inputs, seven(late), new, TARGET)
        for new in (4, 32)
    ]
    listed.append(Case("mixed methods, 4 new tokens", model, inputs, mixed(layers), 4, None))
    single = (Variant("", "ivc_prune", 0.5, {"layer": late}),)
    listed.append(Case("one variant, nothing to share", model, inputs, single, 4, 1 / CEILING))
    inlet = tuple(Variant("", "random", 0.5, {"layer": 0}, seed) for seed in (0, 1))
    listed.append(Case("two variants cut at the input, only vision is shared", model, inputs, inlet, 4, 1 / CEILING))
    return [*listed, *_embedded(device, kind, folder, rows)]


def _mid() -> tuple[Any, int, Any]:
    """Twelve layers, and a vision tower that costs about a third of the decoder's prefill, as in Qwen2.5-VL-7B."""
    from dataclasses import replace

    from ivcp_eval.lab.bench.models import configuration, size

    vision = {"depth": 6, "hidden_size": 256, "intermediate_size": 684, "num_heads": 4, "out_hidden_size": 512}
    shape = replace(size("small"), vision={**vision, "window_size": 112, "fullatt_block_indexes": [2, 5]})
    return shape, 576, configuration(shape)


def _embedded(device: str, dtype: Any, folder: Path, rows: int) -> list[Case]:
    """The shipped model where its weights are here, else one of its shape with random weights."""
    from transformers import AutoModelForImageTextToText

    from ivcp_eval.interface import models
    from ivcp_eval.lab.bench.models import make_inputs
    from ivcp_eval.lab.tiny.processor import build_random

    try:
        source, name = models.locate("tiny").source, "embedded model"
    except models.MissingWeights:
        build_random(folder, seed=0)
        source, name = folder, "embedded model's shape, random"
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None  # every variant decodes the same number of steps
    model.generation_config.pad_token_id = 0
    inputs = make_inputs(model.config, 256, rows, 40, dtype, device)
    _into_vocabulary(inputs, model.config)
    layers = model.config.text_config.num_hidden_layers
    late = max(1, round(16 * layers / 28))
    return [
        Case(f"{name}: seven ratios, cut at {late} of {layers}, 4 new tokens", model, inputs, seven(late), 4, TARGET),
        Case(f"{name}: mixed methods, 4 new tokens", model, inputs, mixed(layers), 4, None),
    ]


def _into_vocabulary(inputs: dict[str, Any], config: Any) -> None:
    """Replace text tokens that a small vocabulary has not."""
    import torch

    ids = inputs["input_ids"]
    special = [value for key, value in vars(config).items() if key.endswith("_token_id") and isinstance(value, int)]
    special += [value for key, value in vars(config.text_config).items() if key.endswith("token_id") and value]
    usual = [i for i in range(config.text_config.vocab_size) if i not in special]
    text = torch.tensor(usual, device=ids.device)[ids % len(usual)]
    inputs["input_ids"] = torch.where(torch.isin(ids, torch.tensor(special, device=ids.device)), ids, text)


def parser() -> argparse.ArgumentParser:
    """Arguments of the bench."""
    parser = argparse.ArgumentParser(prog="ivcp bench fork", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="mid", help="mid, or a size of `ivcp bench`: tiny, small, qwen25_7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=COUNT, default=1, help="prompts in one pass (default: %(default)s)")
    parser.add_argument("--rounds", type=COUNT, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--cell-s", type=AMOUNT, default=120, help="start no round after that many seconds of a case")
    parser.add_argument("--threads", type=COUNT, help="CPU threads of torch; default: as torch finds it")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not elapsed time (shared machines)")
    parser.add_argument("--out", type=Path, help="also write FILE.json: every case, and what it was measured on")
    parser.add_argument("--resume", action="store_true", help="go on behind the calls that a run with the same options "
        "left in FILE.calls.jsonl")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; 0, or 1 if ``--check`` found a missed target."""
    options = parser().parse_args(arguments)
    import torch

    from ivcp_eval.lab.bench.kept import opened
    from ivcp_eval.lab.bench.report import environment

    if options.threads:
        torch.set_num_threads(options.threads)
    command = shlex.join(["ivcp", "bench", "fork", *(sys.argv[1:] if arguments is None else arguments)])
    before, rows = environment(options.device, command), []
    clock = time.process_time if options.cpu_time else time.perf_counter
    calls, missed = opened(options, before), False
    with TemporaryDirectory() as folder:
        for case in cases(options.size, options.device, options.dtype, Path(folder), options.rows):
            spread, milliseconds, equal = measure(
                case, options.rounds, clock, options.cell_s, calls.cell(case.name, lambda found: Timed(**found))
            )
            singles, together = flops(case)
            hit = case.target is None or spread.median >= case.target
            missed |= not hit
            target = "" if case.target is None else f", target {case.target:.2f}: {'met' if hit else 'MISSED'}"
            sys.stdout.write(
                f"{case.name}: {spread.median:.2f}x (quartiles {spread.q1:.2f}-{spread.q3:.2f}, {spread.n} rounds), "
                f"FLOPs allow {singles / together:.2f}x{target}; {milliseconds:.0f} ms a pass; "
                f"{equal} of {len(case.variants)} variants token for token\n"
            )
            sys.stdout.flush()
            numbers = {"times": asdict(spread), "flops": singles / together, "pass_ms": milliseconds, "equal": equal}
            rows.append({"case": case.name, "variants": len(case.variants), "target": case.target, **numbers})
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(options.out.with_suffix(".json"), {**before, "rows": rows})
    return 1 if options.check and missed else 0
