"""Weights of attention heads by ablation: how much accuracy a model loses without one of them.

Paper: https://arxiv.org/abs/2604.07812 (HAWK, eq. 1 to 3). Head h is silenced by setting its part of what the output
projection of every decoder layer gets to zero; of a set of questions, the accuracy lost is shifted so that the least is
0 and divided by the sum over heads; the weights are the mean over sets. The paper does not say in which layers a head
is silenced; all of them is our reading, `layers` names others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ivcp_eval.files import read_json, write_json
from ivcp_eval.interface.variants import Variant
from ivcp_eval.lab.calibration.questions import Question, QuestionSet
from ivcp_eval.runs.answering.session import Session

WHOLE = "none"  # key of the untouched model's accuracy
Accuracies = dict[str, dict[str, float]]  # set of questions -> WHOLE, or a head's number -> share of right answers


def calibrate_heads(
    session: Session,
    sets: Sequence[QuestionSet],
    file: Path,
    layers: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[float]:
    """Measure every head on every set and write the weights; what was measured before is not measured again.

    Beside ``file`` lies the record of it, ``STEM.ablation.json``: model, questions, and accuracy without each head.

    Args:
        layers: decoder layers, 0-based, in which a head is silenced; None is all of them.

    Returns:
        The weights, one for each head, 0 or more, adding up to 1.

    Raises:
        ValueError: the record beside ``file`` is of another model or of other questions; a layer that the model has
            not; or no head makes a difference.
    """
    decoder = session.adapter.text_model(session.model)
    n_heads, n_layers = decoder.config.num_attention_heads, len(decoder.layers)
    silenced = list(range(n_layers)) if layers is None else sorted(set(layers))
    if not silenced or not 0 <= silenced[0] <= silenced[-1] < n_layers:
        raise ValueError(f"layers {list(layers or ())} are not among the model's, 0..{n_layers - 1}")
    about = {
        "model": session.weights.checkpoint.name,
        "revision": session.weights.revision,
        "dtype": session.placement.dtype,
        "layers": silenced,
        "max_new_tokens": session.limits.max_new_tokens,
        "questions": {one.name: {"sha256": one.digest, "count": len(one.questions)} for one in sets},
    }
    record = file.with_suffix(".ablation.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    accuracies = _measured(record, about)
    total = len(sets) * (n_heads + 1)
    for one in sets:
        done = accuracies.setdefault(one.name, {})
        known = answered(session, one.questions) if len(done) <= n_heads else one.questions
        for head in (None, *range(n_heads)):
            key = WHOLE if head is None else str(head)
            if key not in done:
                with without_head(session, head, silenced):
                    done[key] = accuracy(session, known)
                write_json(record, {**about, "accuracy": accuracies})
            n_measured = sum(map(len, accuracies.values()))
            progress(f"[{n_measured}/{total}] {one.name}, {'whole model' if head is None else f'without head {head}'}: "
                     f"{done[key]:.1%}")  # fmt: skip
    weights = head_weights(accuracies, n_heads)
    write_json(file, weights)
    return weights


def _measured(record: Path, about: Mapping[str, Any]) -> Accuracies:
    advice = "remove the file, and everything is measured again"
    try:
        content = read_json(record, advice)
    except FileNotFoundError:
        return {}
    differing = sorted(name for name, value in about.items() if content.get(name) != value)
    if differing:
        raise ValueError(
            f"{record} is of other {', '.join(differing)}, so it cannot be gone on with; name another file to write, "
            f"or {advice}"
        )
    accuracies: Accuracies = content["accuracy"]
    return accuracies


@contextmanager
def without_head(session: Session, head: int | None, layers: Sequence[int]) -> Iterator[None]:
    """The model with one attention head silenced in these decoder layers; whole for None, and again afterwards."""
    decoder = session.adapter.text_model(session.model)
    handles = []
    for layer in layers if head is not None else ():
        output = decoder.layers[layer].self_attn.o_proj
        width = output.in_features // decoder.config.num_attention_heads
        part = slice(head * width, (head + 1) * width)  # type: ignore[operator] # not None here

        def silence(_module: Any, args: tuple[Tensor, ...], part: slice = part) -> tuple[Tensor, ...]:
            states = args[0].clone()
            states[..., part] = 0
            return (states, *args[1:])

        handles.append(output.register_forward_pre_hook(silence))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answered(session: Session, questions: Sequence[Question]) -> list[Question]:
    """The questions, those without an answer with the untouched model's."""
    variant = Variant(session.weights.checkpoint.name)
    return [
        question
        if question.answer is not None
        else replace(question, answer=session.answer(_parts(question), variant).prediction)
        for question in questions
    ]


def accuracy(session: Session, questions: Sequence[Question]) -> float:
    """Share of questions that the model, unpruned, answers right."""
    variant, right = Variant(session.weights.checkpoint.name), 0
    for question in questions:
        answer = session.answer(_parts(question), variant, grounding=not isinstance(question.answer, str))
        right += question.is_right(answer.prediction, answer.box or "")
    return right / len(questions)


def _parts(question: Question) -> list[Mapping[str, Any]]:
    return [{"image": question.image}, {"text": question.text}]


def head_weights(accuracies: Accuracies, n_heads: int) -> list[float]:
    """One weight for each head; sets on which no head makes a difference say nothing.

    Raises:
        ValueError: none does on any set.
    """
    shares = []
    for measured in accuracies.values():
        lost = [measured[WHOLE] - measured[str(head)] for head in range(n_heads)]
        shifted = [one - min(lost) for one in lost]
        if sum(shifted) > 0:
            shares.append([one / sum(shifted) for one in shifted])
    if not shares:
        raise ValueError(
            f"without any one of the {n_heads} heads the model answers as many questions right as without another "
            f"({', '.join(accuracies)}), so there is nothing to weigh them by; ask more or harder questions"
        )
    return [round(sum(share[head] for share in shares) / len(shares), 6) for head in range(n_heads)]
