"""Oracle: pivots and what they take with Python loops, on rows of two images and budgets that do not come out even."""

from __future__ import annotations

import pytest

from ivcp_eval.interface import Image, Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import best, random_signals


def slow_image(signals: Signals, image: Image, pivot_text: int) -> list[int]:
    """Which of the image's tokens stay, by their number in it."""
    assert signals.rotate is not None
    assert signals.normed is not None
    assert signals.key is not None
    keys, states = signals.rotate(signals.key).double(), signals.normed().double()
    at = signals.visual[image.tokens].tolist()
    behind = [column for column in signals.text.tolist() if column > at[-1]]

    def heaviest(columns: list[int], count: int) -> list[int]:
        norm = {column: float(keys[:, column].abs().sum()) for column in columns}
        return sorted(columns, key=lambda column: -norm[column])[:count]

    def likeness(a: int, b: int) -> float:
        return float(states[a] @ states[b] / (states[a].norm() * states[b].norm()))

    own = heaviest(at, min(4, image.budget))
    pivots = list(set(own + heaviest(behind, pivot_text)))
    kept = list(own)
    for place, pivot in enumerate(pivots):
        left = image.budget - len(own)
        share = left // len(pivots) + (1 if place < left % len(pivots) else 0)
        rest = [column for column in at if column not in kept]
        kept += [rest[i] for i in best([-likeness(column, pivot) for column in rest], share)]
    return sorted(at.index(column) for column in kept)


@pytest.mark.parametrize("pivot_text", [4, 2, 0])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.83])
def test_every_image_has_its_budget_to_the_token(ratio: float, pivot_text: int) -> None:
    signals = random_signals((5, 9), (4, 7), ratio=ratio, seed=2, question=7)
    kept = make_method("dart", {"pivot_text": pivot_text}).select(signals).keep.tolist()
    wanted = [int(image.tokens[token]) for image in signals.images for token in slow_image(signals, image, pivot_text)]
    assert kept == sorted(wanted)
    assert len(kept) == signals.budget
    assert any((image.budget - 4) % (4 + pivot_text) for image in signals.images), "an even split shows nothing"
