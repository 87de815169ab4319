"""Answers hold what was kept: alike alone, forked and in a batch, and with what only the processor knows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

import ivcp_eval
from ivcp_eval.interface import models
from ivcp_eval.interface.records.masks import Masks
from ivcp_eval.interface.registry import adapter
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement
from tests.engine import tiny_models

VARIANTS = [Variant("tiny", name, 0.5) for name in ("random", "pyramiddrop", "visionzip", "downsample")]


def test_alone_forked_and_in_a_batch_alike(random_model: Path) -> None:
    session = Session(models.locate("tiny", random_model), Placement("cpu").resolve(), Limits(784, 100352, 2))
    pictures = [Image.new("RGB", size, "red") for size in ((112, 84), (84, 168))]
    samples = [[{"image": picture}, {"text": "What colour is it?"}] for picture in pictures]
    together = session.answer_batch(samples, VARIANTS)
    for sample, batched, grid in zip(samples, together, ((3, 4), (6, 3)), strict=True):
        alone = [session.answer(sample, variant).masks for variant in VARIANTS]
        assert alone == [answer.masks for answer in session.answer_all(sample, VARIANTS)]
        assert alone == [answer.masks for answer in batched]
        assert not alone[3], "a smaller picture is not cut"
        for text, answer, n_cuts in zip(alone[:3], batched, (1, 3, 1), strict=False):
            masks = Masks.from_text(text)
            assert len(masks.cuts) == n_cuts
            assert masks.mask().shape == grid
            assert masks.mask().sum() == answer.visual_kept


@pytest.mark.parametrize(("pads", "covers"), [(False, (0.25, 0, 0.75, 1)), (True, (0, -0.5, 1, 1.5))])
def test_what_only_the_processor_knows_is_filled_in(pads: bool, covers: tuple[float, ...]) -> None:
    """LLaVA-1.5 cuts the middle square out of a picture, or pads it to one; its inputs do not say so."""
    model, make_inputs = tiny_models.build("llava")
    with torch.no_grad(), ivcp_eval.prune(model, "random", 0.5) as run:
        model(**make_inputs("t5 i0 t9"))
    session = object.__new__(Session)
    session.adapter = adapter("llava")
    session.processor = SimpleNamespace(image_processor=LlavaImageProcessor(do_pad=pads))
    masks = session._masks(run, [{"text": "?"}, {"image": Image.new("RGB", (200, 100))}])
    assert run.masks().view().covers is None
    assert masks.view().covers == pytest.approx(covers, abs=1e-9)
    assert masks.mask().tolist() == run.mask().tolist()
