"""The box in an answer to a grounding question, in the family's declared format."""

from __future__ import annotations

from ivcp_eval.benchmarks.boxes import FORMATS, format_answer, parse_answer
from ivcp_eval.benchmarks.thinking import split_thinking
from ivcp_eval.interface import AbstractAdapter

NO_BOX = "no box"


def scored_box(text: str, adapter: AbstractAdapter, frame: tuple[int, int] | None) -> str:
    """The canonical box that is scored, as fractions of the picture, or `NO_BOX`.

    Args:
        frame: (width, height) of the picture that pixels refer to; None where the family's boxes are relative.
    """
    if not adapter.box_format:
        return NO_BOX
    answer, _ = split_thinking(text)
    box = parse_answer(answer, FORMATS[adapter.box_format], frame)
    return NO_BOX if box is None else format_answer(box, FORMATS["unit"])
