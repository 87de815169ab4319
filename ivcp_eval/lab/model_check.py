"""Checks of a model's wiring on its real weights: what one runs once before trusting a number made with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.engine import prune
from ivcp_eval.interface import AbstractMethod, Cut, ModelFacts, Selection, Signal, Signals
from ivcp_eval.runs.answering.session import Session

QUESTION = "What colour is the large shape in the picture?"


@dataclass(frozen=True)
class _Probe(AbstractMethod):
    """Keeps the first tokens of each image and remembers what it was shown."""

    layer: int = 1
    signals: frozenset[Signal] = frozenset()
    seen: list[Signals] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    needs: ClassVar[frozenset[Signal]] = frozenset()

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return (Cut(self.layer, ratio, needs=self.signals),)

    def select(self, signals: Signals) -> Selection:
        self.seen.append(signals)
        if {"query", "key"} <= self.signals:
            self.rows.append(signals.attention(signals.question[-1:]))
        return Selection(torch.cat([image.tokens[: image.budget] for image in signals.images]).sort().values)


def picture(size: tuple[int, int] = (448, 336)) -> Any:
    """A red disc on a grey ground with a blue bar: enough for a model to have something to say."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, (200, 200, 200))
    draw = ImageDraw.Draw(image)
    draw.ellipse([120, 60, 330, 270], fill=(210, 30, 30))
    draw.rectangle([20, 280, 200, 310], fill=(30, 60, 200))
    return image


def check_model(session: Session, say: Callable[[str], None]) -> list[str]:
    """Run every check, say each result, and return the failures in words (empty: the model can be trusted).

    Checks: each signal of the family has the shape the seam promises and comes from the tensor that the model really
    uses (overwriting the projection changes the logits); attention rows sum to 1; ratio 1 is bit-equal to the
    untouched model; a pruned cache has the length that was asked for.
    """
    failures: list[str] = []

    def report(name: str, problem: str) -> None:
        say(f"{'ok  ' if not problem else 'FAIL'} {name}{': ' + problem if problem else ''}")
        if problem:
            failures.append(f"{name}: {problem}")

    model, wired = session.model, session.adapter
    parts: list[Mapping[str, Any]] = [{"image": picture()}, {"text": QUESTION}]
    inputs = wired.encode(session.processor, [parts])
    device = next(model.parameters()).device
    tensors = {k: v.to(device) if hasattr(v, "to") else v for k, v in inputs.items()}
    layers = wired.text_model(model).layers
    layer = max(wired.facts(model.config, session.weights.family).first_cut, len(layers) // 2, 1)

    def logits() -> Tensor:
        with torch.inference_mode():
            return model(**tensors).logits[:, -1].float()

    untouched = logits()
    with prune(model, "none") as run:
        same = logits()
    report("ratio 1 is bit-equal to the untouched model", "" if torch.equal(untouched, same) else "logits differ")
    n_visual = run.visual_prompt[0]
    report("visual tokens found", "" if n_visual else "none in a prompt with a picture")
    if not n_visual:
        return failures
    for signal in ("value", "key", "query"):
        report(f"signal {signal}", _signal_problem(session, signal, layer, logits, untouched))
    if not failures:
        report("attention rows", _attention_problem(session, layer, logits))
    with prune(model, "ivc_prune", ratio=0.5) as run, torch.inference_mode():
        model(**tensors, use_cache=True)
    kept = run.visual_prompt[0] - run.visual_kept[0]
    expected = inputs["input_ids"].shape[1] - kept
    lengths = set(run.kv_lengths)
    report(
        "pruned cache length",
        "" if lengths == {expected} else f"layers hold {sorted(lengths)} tokens, expected {expected}",
    )
    return failures


def _signal_problem(
    session: Session, signal: Signal, layer: int, logits: Callable[[], Tensor], untouched: Tensor
) -> str:
    wired, model = session.adapter, session.model
    if wired.unsupported(model, signal):
        return ""
    probe = _Probe(layer=layer, signals=frozenset({signal}))
    with prune(model, probe, ratio=0.5):
        logits()
    states, tokens = getattr(probe.seen[0], signal), probe.seen[0].hidden.shape[0]
    config = wired.text_model(model).config
    # DeepSeek-V2's latent attention has as many key and value heads as query heads.
    allowed = {config.num_attention_heads} | ({config.num_key_value_heads} if signal != "query" else set())
    if states is None or states.ndim != 3 or states.shape[0] not in allowed or states.shape[1] != tokens:
        shape = None if states is None else tuple(states.shape)
        return f"shape {shape}, expected ({' or '.join(map(str, sorted(allowed)))} heads, {tokens} tokens, head size)"
    module, _ = wired.projection(wired.text_model(model).layers[layer - 1], signal)
    handle = module.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
    try:
        changed = logits()
    finally:
        handle.remove()
    return "" if not torch.equal(changed, untouched) else "overwriting it does not change the logits"


def _attention_problem(session: Session, layer: int, logits: Callable[[], Tensor]) -> str:
    if any(session.adapter.unsupported(session.model, signal) for signal in ("query", "key")):
        return ""
    probe = _Probe(layer=layer, signals=frozenset({"query", "key"}))
    with prune(session.model, probe, ratio=0.5):
        logits()
    sums = probe.rows[0].sum(-1)
    return (
        "" if torch.allclose(sums, torch.ones_like(sums), atol=1e-3) else f"they sum to {sums.flatten()[:4].tolist()}"
    )
