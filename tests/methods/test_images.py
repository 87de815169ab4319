"""Each image has its own budget, and what is chosen of it does not depend on the other images of the row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ivcp_eval.interface import Image, Signals
from tests.methods.material import random_signals
from tests.methods.test_degenerate import CHOOSING, chosen

TOGETHER = {
    "cdpruner_openvino": "leaves out of the question what stands beside any image",
    "random": "draws once for the row",
    "sparsevlm": "raters are chosen by all images of the row",
}


def only(signals: Signals, image: Image) -> Signals:
    """The same row, of which nothing but this image is an image."""
    own = image.tokens
    assert signals.columns is not None
    return replace(
        signals,
        images=(replace(image, tokens=torch.arange(own.numel())),),
        visual=signals.visual[own],
        vision={name: signal[own] for name, signal in signals.vision.items()},
        columns=signals.columns[own],
    )


@pytest.mark.parametrize("name", [name for name in CHOOSING if name not in TOGETHER])
def test_images_are_chosen_from_one_by_one(name: str) -> None:
    def row() -> Signals:  # a fresh one, whose generator and memory nothing has touched
        return random_signals((6, 8), (5, 7), (1, 1), ratio=0.4, seed=3)

    together = chosen(name, row()).keep
    alone = [image.tokens[chosen(name, only(row(), image)).keep] for image in row().images]
    assert together.tolist() == torch.cat(alone, dim=-1).sort(dim=-1).values.tolist()
