"""What choosing costs beside the prefill it saves: every method, interleaved with its own cuts made without a choice.

Part of ``ivcp bench``; how to read it: docs/bench.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.engine import prune, resolve
from ivcp_eval.engine.cost import clock
from ivcp_eval.engine.cost.rounds import Spread, interleave
from ivcp_eval.interface import AbstractMethod, AbstractScorer, Cut, ModelFacts, Signals
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import make_method

if TYPE_CHECKING:
    from ivcp_eval.lab.bench.kept import Calls
    from ivcp_eval.lab.bench.pruning import Setup

BASELINE = "none"
CUT_ALONE = "cut alone"
RATIO = 0.5


class Idle(AbstractScorer):
    """Given cuts, without signals or a choice: the first tokens of each image stay."""

    name = "idle"

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self._cuts = tuple(dataclasses.replace(cut, needs=frozenset(), late=False) for cut in cuts)

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Those given."""
        return self._cuts

    def score(self, signals: Signals) -> torch.Tensor:
        """Equal for all; ties fall to the lower index."""
        return torch.zeros(signals.n_visual, device=signals.hidden.device)


@dataclass(frozen=True)
class Timed:
    """One prefill: vision encoder and decoder, and how long the method itself was at work in them."""

    vision_ms: float
    prefill_ms: float
    select_ms: float

    @property
    def total_ms(self) -> float:
        """Both."""
        return self.vision_ms + self.prefill_ms


@dataclass(frozen=True)
class Candidate:
    """A method that can run here, with its cuts at the ratio; ``share`` is that of its prompt (smaller pictures)."""

    name: str
    cuts: tuple[Cut, ...]
    share: float = 1.0


def candidates(setup: Setup, names: Sequence[str], ratio: float) -> tuple[list[Candidate], dict[str, str]]:
    """The methods that can run on the bench's model, and why the others cannot."""
    usable, reasons = [], {}
    for name in names:
        try:
            resolved = resolve(setup.model, name, ratio, None, {})
        except ValueError as error:
            reasons[name] = str(error)
            continue
        usable.append(Candidate(name, resolved.cuts, resolved.method.pixel_share(ratio) or 1.0))
    return usable, reasons


def measure_selection(
    setup: Setup,
    visual_tokens: int,
    batch: int,
    seconds: float,
    names: Sequence[str],
    calls: Calls,
    keep: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    ratio: float = RATIO,
) -> list[dict[str, Any]]:
    """One row per method on one prompt; columns as in docs/bench.md.

    Methods come one after the other, each in turns with the unpruned model and with its cut alone, so that a bench that
    is cut has measured some of them.

    Args:
        setup: with a whole vision tower, which some methods listen to. seconds: no round of a method starts after its
            equal part of so many. names: registered methods; the unpruned model is always part.
        keep: gets the rows that there are after every method.
    """
    from ivcp_eval.lab.bench.models import make_inputs

    usable, reasons = candidates(setup, names, ratio)
    usable = [Candidate(BASELINE, ()), *(one for one in usable if one.name != BASELINE)]
    make = partial(
        make_inputs,
        setup.model.config,
        batch=batch,
        text_tokens=setup.size.text_tokens,
        dtype=setup.dtype,
        device=setup.device,
    )
    common = {"attention": setup.attention, "visual_tokens": visual_tokens, "batch": batch, "ratio": ratio}
    rows: list[dict[str, Any]] = []
    whole = make(visual_tokens)
    for one in usable:
        run: dict[str, Callable[[], Timed]] = {BASELINE: partial(_run_once, setup, whole, None, 1.0)}
        if one.share < 1:  # what is saved by a smaller picture is saved before any choice
            run[one.name] = partial(_run_once, setup, make(budget(one.share, visual_tokens)), None, 1.0)
        elif one.name != BASELINE:
            run[one.name] = partial(_run_once, setup, whole, one.name, ratio)
            if one.cuts:
                run[CUT_ALONE] = partial(_run_once, setup, whole, Idle(one.cuts), ratio)
        kept = calls.cell(f"{setup.attention} {visual_tokens} {batch} {one.name}", lambda found: Timed(**found))
        try:
            row = _row(one, interleave(run, setup.size.rounds, 1, seconds / len(usable), kept))
        except torch.OutOfMemoryError as error:
            row = {"variant": one.name, "note": f"out of memory: {str(error).splitlines()[0]}"}
        rows.append({**common, **row})
        keep(rows)
    return [*rows, *({**common, "variant": name, "note": reason} for name, reason in reasons.items())]


def _run_once(setup: Setup, inputs: dict[str, Any], method: str | AbstractMethod | None, ratio: float) -> Timed:
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(clock.call_time(setup.model, cpu_time=setup.cpu_time))
        if method is not None:
            stack.enter_context(prune(setup.model, _watched(method, watch), ratio))
        phases = stack.enter_context(clock.phases(setup.model, setup.adapter, cpu_time=setup.cpu_time))
        setup.model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    return Timed(phases.vision_ms or 0.0, phases.prefill_ms, sum(watch.ms))


def _watched(method: str | AbstractMethod, watch: clock.CallTime) -> AbstractMethod:
    """The method with its own work under the clock. The instance is a frozen dataclass, and of this run only."""
    watched = make_method(method) if isinstance(method, str) else method
    if isinstance(method, str):
        for work in ("select", "edit_keys"):
            object.__setattr__(watched, work, watch.around(getattr(watched, work)))
    return watched


def _row(one: Candidate, rounds: Mapping[str, list[Timed]]) -> dict[str, Any]:
    mine, stock = rounds[one.name], rounds[BASELINE]
    idle = rounds[CUT_ALONE] if one.cuts else stock

    def median(values: list[float]) -> float:
        return Spread.of(values).median

    def difference(before: list[Timed], after: list[Timed]) -> float:
        """Median of the differences round by round: drift that both share cancels."""
        return median([b.total_ms - a.total_ms for b, a in zip(before, after, strict=True)])

    row: dict[str, Any] = {
        "variant": one.name,
        "layers": " ".join(str(cut.layer) for cut in one.cuts if cut.ratio < 1),
        "rounds": len(mine),
        "vision_ms": median([timed.vision_ms for timed in mine]),
        "prefill_ms": median([timed.prefill_ms for timed in mine]),
        "total_ms_rounds": [timed.total_ms for timed in mine],
    }
    if one.name == BASELINE:
        return row
    row["unpruned_ms_rounds"] = [timed.total_ms for timed in stock]
    if one.share < 1:
        saved = difference(stock, mine)
        note = "its prompt is that of the smaller picture, made beforehand"
        return {**row, "saved_ms": saved, "net_ms": saved, "note": note}
    saved, spent = difference(stock, idle) if one.cuts else 0.0, difference(mine, idle)
    return {
        **row,
        "select_ms": median([timed.select_ms for timed in mine]),
        "selection_ms": spent,
        "saved_ms": saved,
        "net_ms": saved - spent,
        "idle_ms_rounds": [timed.total_ms for timed in idle],
    }
