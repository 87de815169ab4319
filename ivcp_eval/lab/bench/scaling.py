"""How the cost of choosing grows with the image or video: every method on made-up signals of one row, without a model.

``ivcp bench selection --tokens 1024 4096 16384``, or ``--frames 8 32 128``. How to read the table: docs/bench.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.engine.signals.source import attention_rows, images_at_cut
from ivcp_eval.files import as_shown, atomic_write
from ivcp_eval.interface import (
    AbstractMethod,
    Cut,
    Frame,
    Geometry,
    ImageSpan,
    ModelFacts,
    Patches,
    Selection,
    Signals,
    TowerFacts,
)
from ivcp_eval.interface.registry import make_method, method_names
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.runs.planning.numbers import COUNT, SHARE

if TYPE_CHECKING:
    from torch import Tensor

MOST_OPERATIONS = 500  # each at most a kernel launch on a GPU, of about 5 microseconds
MOST_OF_A_FRAME = 300  # of a video: 1.5 ms, where the prefill of its 64 tokens takes as long on a fast GPU
MOST_OF_PREFILL = 0.05  # of the prefill's FLOPs at 7B shape
SERVED = DecoderShape(  # config.json of Qwen/Qwen2.5-VL-7B-Instruct
    layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, intermediate=18944
)
TOWER = TowerFacts(n_blocks=24, own=22, whole=tuple(range(24)), class_token=True)
QUESTION = 60
FRAME = 256  # tokens of a frame where a method chooses among the frames of a clip and no number of frames is given
RATIO = 0.5
SCENE = 8  # steps of a video that show the same, but for what moves
#: Operations for each element of the largest tensor that a call reads or writes; all other calls count 1.
PER_ELEMENT = {
    **dict.fromkeys(("exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "pow", "reciprocal", "div"), 4),
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp"), 8),  # largest, difference, exponential, sum, quotient
    **dict.fromkeys(("linalg_vector_norm", "norm", "var", "std", "cumsum", "cumprod", "mv", "addmv", "dot", "vdot"), 2),
}
PICKING = ("index", "index_select", "gather")  # read only what they write
SORTING = ("sort", "topk", "argsort", "kthvalue", "median", "quantile", "unique")  # 1 for each level of a sorted row


@dataclass(frozen=True)
class Widths:
    """Of the signals: hidden states and features of the tower, attention heads, key heads, and a head's dimension."""

    hidden: int
    heads: int = 8
    groups: int = 2
    head: int = 64


@dataclass(frozen=True)
class Cost:
    """One choice, all cuts of it: seconds, operations that torch dispatched, FLOPs of matrix products, and all others.

    ``work`` counts by `PER_ELEMENT`; what a method computes on the host outside of torch is in the seconds alone.
    ``frames``: of the clip that was chosen from; 1 for an image.
    """

    seconds: float
    operations: int
    flops: int
    work: int = 0
    frames: int = 1


class _Operations(TorchDispatchMode):
    """Counts operations that compute; views, and reading a number, start no kernel."""

    free = (
        *("aten::lift_fresh", "aten::detach", "aten::_local_scalar_dense", "aten::empty", "aten::split_with_sizes"),
        *("aten::_unsafe_view", "aten::is_coalesced"),
    )
    count = work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(self.free):
            self.count += 1
            if func.overloadpacket not in flop_registry:
                self.work += work_of(func.overloadpacket.__name__, args, out)
        return out


def work_of(name: str, args: Any, out: Any) -> int:
    """Operations of one call that is no matrix product, by `PER_ELEMENT`.

    Args:
        name: of the operator. args, out: what it read and wrote.
    """
    name = name.strip("_")
    touched = out if name in PICKING else (args, out)
    tensors = [leaf for leaf in tree_leaves(touched) if isinstance(leaf, torch.Tensor)]
    elements = max((tensor.numel() for tensor in tensors), default=0)
    if name.startswith("cdist"):  # difference, square and sum over the width of every pair
        return 3 * out.numel() * int(args[0].shape[-1])
    if name in SORTING:
        return elements * max(1, math.ceil(math.log2(max(args[0].shape, default=1) or 1)))
    return elements * PER_ELEMENT.get(name, 1)


def spans_of(n: int, frames: int) -> list[ImageSpan]:
    """An image of ``n`` tokens, or the steps of a video with so many together; blocks move and lie by chance."""
    if not frames:
        return [_span(torch.arange(n), None)]
    drawn = np.random.default_rng(0).exponential(size=(frames, 32, 32)).astype(np.float32)
    return [
        _span(columns, Frame(0, i, i / 2, motion, Geometry(1 + motion, np.eye(3, 4), (1.0, 1.0))))
        for i, (columns, motion) in enumerate(zip(torch.arange(n).chunk(frames), drawn, strict=True))
    ]


def _span(columns: Tensor, frame: Frame | None) -> ImageSpan:
    side = math.isqrt(columns.numel())
    return ImageSpan(columns, grid=(side, side) if side * side == columns.numel() else None, frame=frame)


def _scenes(spans: Sequence[ImageSpan], width: int, generator: torch.Generator) -> Tensor:
    """(n, width) states of a video: what half of the places show stays the same over eight steps, nearly."""
    size = spans[0].columns.numel()
    scenes = torch.randn(-(-len(spans) // SCENE), size, width, generator=generator)
    spread = torch.where(torch.arange(size) < size // 2, 0.1, 0.7)[:, None]
    noise = spread * torch.randn(len(spans), size, width, generator=generator)
    return (scenes.repeat_interleave(SCENE, dim=0)[: len(spans)] + noise).flatten(0, 1)


def signals_of(
    method: AbstractMethod,
    cut: Cut,
    stage: int,
    alive: Tensor,
    spans: Sequence[ImageSpan],
    widths: Widths,
    memory: dict[str, Any],
    device: str,
) -> Signals:
    """Random signals of a row with one image or video, of whose tokens ``alive`` (increasing) are left."""
    generator = torch.Generator().manual_seed(stage)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    visual = torch.arange(alive.numel(), device=device)
    total = alive.numel() + QUESTION
    text = torch.arange(alive.numel(), total, device=device)
    hidden = draw(total, widths.hidden)
    if spans[0].frame is not None:
        hidden[: alive.numel()] = _scenes(spans, widths.hidden, torch.Generator().manual_seed(0))[alive].to(device)
    key, query = draw(widths.groups, total, widths.head), draw(widths.heads, total, widths.head)
    images = images_at_cut(list(spans), alive, cut.ratio, cut.budget)
    return Signals(
        images=tuple(replace(image, tokens=image.tokens.to(device)) for image in images),
        visual=visual,
        text=text,
        question=text,
        hidden=hidden,
        rope=lambda: (draw(3, total, widths.head), draw(3, total, widths.head)),
        attention=lambda rows, entering=False: attention_rows(query, key, rows, widths.head**-0.5),
        rotate=lambda states: states,
        project=lambda signal: query if signal == "query" else key,
        normed=lambda: hidden,
        value=draw(widths.groups, total, widths.head),
        key=key,
        query=query,
        vision=_tower(method, draw, alive.numel(), widths) if "vision" in method.needs else {},
        columns=alive,
        cut=cut,
        ids=torch.arange(total),
        stage=stage,
        generator=torch.Generator().manual_seed(0),
        memory=memory,
    )


def _tower(method: AbstractMethod, draw: Any, n: int, widths: Widths) -> Mapping[str, Tensor]:
    wide: dict[str, tuple[int, ...]] = {"key": (widths.head,), "query": (widths.heads, widths.head)}
    wide |= {"feature": (widths.hidden,), "joint_key": (widths.hidden,), "luma": (2, 28 * 28)}
    return {
        f"{name}/{signal}" if name else signal: draw(n, *wide[signal]) if signal in wide else draw(n).exp()
        for name in method.tower_blocks(TOWER)
        for signal in sorted(method.tower_signals)
    }


def measure(name: str, n: int, ratio: float, widths: Widths, device: str = "cpu", frames: int = 0) -> Cost | None:
    """What a method takes to choose among ``n`` tokens, of an image or of a video; None if it chooses none (`no_row`).

    Args:
        frames: of the video; without, those of `FRAME` tokens where the method chooses among frames, else an image.
    """
    method = make_method(name)
    cuts = _cuts(method, ratio)
    if not frames and of_clips(method, cuts):
        frames = max(1, n // FRAME)
    spans, memory = spans_of(n, frames), dict[str, Any]()
    seconds, operations, flops, work, alive = 0.0, 0, 0, 0, torch.arange(n)
    jobs: list[tuple[int, Cut, Callable[[Signals], Selection | None]]]
    jobs = [(stage, cut, method.observe) for stage, cut in enumerate(cuts) if cut.late]
    jobs += [(stage, cut, partial(_select, method, n=n, ratio=ratio)) for stage, cut in enumerate(cuts)]
    for stage, cut, ask in jobs:
        signals = signals_of(method, cut, stage, alive, spans, widths, memory, device)
        kept = {name: copy(value) for name, value in memory.items()}  # lists of what was observed grow in place
        with _Operations() as counted, FlopCounterMode(display=False) as counter:  # counting takes time of its own
            ask(replace(signals, memory=kept))
        begin = _now(device)
        selection = ask(signals)
        seconds += _now(device) - begin
        operations, work = operations + counted.count, work + counted.work
        flops += counter.get_total_flops()
        if selection is not None:
            selection.check(signals, name)
            alive = alive if cut.evicts else alive[selection.keep.sort().values.cpu()]
    return Cost(seconds, operations, flops, work, len(spans)) if any(cut.ratio < 1 for cut in cuts) else None


def _cuts(method: AbstractMethod, ratio: float) -> tuple[Cut, ...]:
    return method.cuts(ModelFacts("qwen2_5_vl", SERVED.layers, position_axes=3), ratio)


def of_clips(method: AbstractMethod, cuts: Sequence[Cut]) -> bool:
    """Whether a method is made to choose among the frames of a clip; on pictures it is like others."""
    return method.for_videos or any(cut.budget == "clip" for cut in cuts)


def of_videos() -> list[str]:
    """The registered methods of clips."""
    made = {name: make_method(name) for name in method_names()}
    return [name for name, one in made.items() if of_clips(one, _cuts(one, RATIO))]


def no_row(method: AbstractMethod, name: str) -> str:
    """Why a method that has no cut at all chooses nothing, in words."""
    if name == BASELINE:
        return "the unpruned model"
    if method.repeats_baseline:
        return "answers as the unpruned model does"
    if method.is_served:
        return "what a server chooses is not known here"
    if method.pixel_share(0.5) is not None:
        return "makes pictures smaller before the model sees them"
    if "cached_key" in method.needs:
        return "edits cached keys and chooses no tokens; `ivcp bench` times it"
    if "step" in method.needs:
        return "masks tokens while decoding; nothing is chosen in the prefill"
    if "sparse" in method.needs:
        return "masks pairs of tokens in every layer of the prefill; none leaves"
    return "makes no cut"


def _select(method: AbstractMethod, signals: Signals, *, n: int, ratio: float) -> Selection:
    """The choice, with what the method does inside the tower."""
    if "group" in method.tower_signals:
        assert signals.key is not None
        group = torch.arange(n + 1, device=signals.visual.device)
        left = n + 1
        for block in range(TOWER.own + 1):
            new = method.merge_patches(Patches(signals.key[0, :left], block, n, ratio, TOWER))
            group, left = new[group], int(new.max()) + 1
        signals = replace(signals, vision={**signals.vision, "group": group[1:]})
    return method.select(signals)


def _now(device: str) -> float:
    """Processor time of this process; on a GPU elapsed time once it is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def row(
    name: str, tokens: Sequence[int], costs: Sequence[Cost], widths: Widths, frames: Sequence[int] = ()
) -> dict[str, Any]:
    """Columns as in docs/bench.md; ``frames``: of the videos that have so many tokens."""
    last = costs[-1]
    served = SERVED.prefill_flops([tokens[-1]] * SERVED.layers)
    columns: dict[str, Any] = {"method": name}
    sizes = [f"{count} frames" for count in frames] or tokens
    columns |= {f"{size} ms": 1e3 * cost.seconds for size, cost in zip(sizes, costs, strict=True)}
    if len(tokens) > 1:
        growth = math.log(max(last.seconds, 1e-6) / max(costs[-2].seconds, 1e-6))
        columns["slope"] = growth / math.log(tokens[-1] / tokens[-2])
    columns |= {"frames": last.frames, "operations": last.operations}
    columns["of prefill"] = (last.flops + last.work) * SERVED.hidden / widths.hidden / served
    most = max(MOST_OPERATIONS, MOST_OF_A_FRAME * (last.frames if last.frames > 1 else 0))
    columns["met"] = last.operations <= most and columns["of prefill"] <= MOST_OF_PREFILL
    return columns


def markdown_table(file: Path) -> str:
    """The rows of a CSV of this bench, the fastest at the largest size first."""
    from tabulate import tabulate

    rows = _read(file)
    sizes = [name for name in rows[0] if name.endswith(" ms")]
    rows.sort(key=lambda one: float(one[sizes[-1]]))
    shown = [
        {
            "method": f"`{one['method']}`" + _frames(one, sizes),
            **{_heading(size): _milliseconds(float(one[size])) for size in sizes},
            "slope": f"{float(one['slope']):.1f}",
            "operations": f"{int(one['operations']):,}",
            "of prefill": "< 0.1 %" if float(one["of prefill"]) < 0.001 else f"{100 * float(one['of prefill']):.1f} %",
            "target": "met" if one["met"] == "True" else "missed",
        }
        for one in rows
    ]
    align = ("left", *("right" for _ in sizes), "right", "right", "right", "left")
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True, colalign=align)


def _heading(size: str) -> str:
    count = size.removesuffix(" ms")
    return f"{int(count):,} tokens" if count.isdigit() else count


def _frames(one: Mapping[str, str], sizes: Sequence[str]) -> str:
    """How many frames a method of clips chose from, where the table says tokens."""
    return f" ({one['frames']} frames)" if int(one["frames"]) > 1 and "frames" not in sizes[-1] else ""


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def parser() -> argparse.ArgumentParser:
    """Arguments of ``ivcp bench selection``."""
    parser = argparse.ArgumentParser(prog="ivcp bench selection", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=COUNT, nargs="+", default=[1024, 4096, 16384], help="visual tokens of the image"
    )
    parser.add_argument("--frames", type=COUNT, nargs="+", help="of a video in place of an image, with --per-frame "
        "tokens each; its methods are those of videos by default")  # fmt: skip
    parser.add_argument("--per-frame", type=COUNT, default=64, help="tokens of a frame, a square (default: 64)")
    parser.add_argument("--ratio", type=SHARE, default=RATIO, help="retention ratio (default: 0.5)")
    parser.add_argument("--hidden", type=COUNT, default=512, help="width of states and features (default: 512)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: every method")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=COUNT, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, help="write a CSV; rows that it has of other methods stay with --methods")
    parser.add_argument("--check", action="store_true", help="exit 1 if a method misses its targets")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; 0, or 1 if ``--check`` found a missed target."""
    from tabulate import tabulate
    from tqdm import tqdm

    options = parser().parse_args(argv)
    if (least := min(*options.tokens, options.per_frame)) < 4:
        raise ValueError(f"--tokens and --per-frame must be at least 4, got {least}")
    frames, widths = sorted(set(options.frames or ())), Widths(options.hidden)
    tokens = [options.per_frame * count for count in frames] or sorted(set(options.tokens))
    sizes = list(zip(tokens, frames or [0] * len(tokens), strict=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    reasons: list[str] = []
    others = _read(options.out) if options.methods and options.out and options.out.exists() else []
    try:
        for name in tqdm(options.methods or (of_videos() if frames else method_names()), unit="method"):
            n, count = sizes[0]
            warm = measure(name, n if frames else min(n, FRAME), options.ratio, widths, options.device, count)
            if warm is None:  # also because first calls cost more
                reasons.append(f"no row of {name}: {no_row(make_method(name), name)}")
                continue
            costs = [measure(name, n, options.ratio, widths, options.device, count) for n, count in sizes]
            rows.append(row(name, tokens, [cost for cost in costs if cost is not None], widths, frames))
            if options.out:  # after every method, so that an interrupted bench keeps what it has
                _write(options.out, rows, others)
    finally:
        torch.set_num_threads(threads)
    sys.stdout.write("\n".join([tabulate(rows, headers="keys", floatfmt=".3g"), *reasons, ""]))
    return 1 if options.check and not all(one["met"] for one in rows) else 0


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _write(path: Path, rows: Sequence[dict[str, Any]], others: Sequence[dict[str, str]]) -> None:
    names = list(rows[0])
    if others and list(others[0]) != names:
        raise ValueError(
            f"{path} has the columns {', '.join(others[0])}, and this bench measured {', '.join(names)}; "
            "measure the same sizes, or give another --out"
        )
    new = {one["method"]: {name: as_shown(str(value)) for name, value in one.items()} for one in rows}
    merged = {one["method"]: one for one in others} | new
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(merged[name] for name in (sorted(merged) if others else merged))
