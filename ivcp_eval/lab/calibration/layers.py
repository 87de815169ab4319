"""How much low bits distort what enters each decoder layer, for QUOTA's schedule.

Paper: https://arxiv.org/abs/2604.17320. Over calibration prompts the median of ||x_q - x|| / (||x|| + eta), x being all
states of a prompt that enter the layer and x_q these in few bits, one scale per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from ivcp_eval.files import write_json
from ivcp_eval.interface.variants import Variant
from ivcp_eval.lab.calibration.questions import QuestionSet
from ivcp_eval.methods.quota import distortion, rounded
from ivcp_eval.runs.answering.session import Session


def calibrate_layers(
    session: Session,
    sets: Sequence[QuestionSet],
    file: Path,
    bits: int = 4,
    eta: float = 1e-6,
    progress: Callable[[str], None] = lambda text: None,
) -> list[float]:
    """Measure every layer on every question and write one number for each; beside it what they were made from.

    Returns:
        The sensitivities, one for each decoder layer, before they are moved to 0..1.
    """
    variant = Variant(session.weights.checkpoint.name)
    found: list[list[float]] = []
    for one in sets:
        for question in one.questions:
            with listening(session, bits, eta) as measured:
                session.answer([{"image": question.image}, {"text": question.text}], variant)
            found.append(measured)
        progress(f"{one.name}: {len(one.questions)} prompts")
    numbers = [round(median(values), 6) for values in zip(*found, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, numbers)
    about = {
        "model": session.weights.checkpoint.name,
        "revision": session.weights.revision,
        "quantised": session.weights.quantised,
        "dtype": session.placement.dtype,
        "bits": bits,
        "eta": eta,
        "questions": {one.name: {"sha256": one.digest, "count": len(one.questions)} for one in sets},
    }
    write_json(file.with_suffix(".made.json"), about)
    return numbers


@contextmanager
def listening(session: Session, bits: int, eta: float) -> Iterator[list[float]]:
    """What the prefill inside the block shows, a number for each decoder layer."""
    measured: list[float] = []

    def listen(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states: Tensor = (args[0] if args else kwargs["hidden_states"]).float()
        if len(measured) < len(layers):  # decoding is no prompt
            whole = states.flatten()
            measured.append(float(distortion(rounded(states, bits).flatten(), whole, eta)))

    layers = session.adapter.text_model(session.model).layers
    handles = [layer.register_forward_pre_hook(listen, with_kwargs=True) for layer in layers]
    try:
        yield measured
    finally:
        for handle in handles:
            handle.remove()
