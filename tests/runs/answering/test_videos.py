"""Questions about videos, decoded already."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ivcp_eval.interface import Frame
from ivcp_eval.interface.failures import InputRefused
from ivcp_eval.interface.models import locate
from ivcp_eval.interface.records.masks import Masks
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.served.endpoint import _messages
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement


def test_a_session_answers_about_a_video(random_model: Path) -> None:
    """Encoded, pruned, counted and recorded; a method that shrinks pictures refuses."""
    weights = locate("tiny", random_model)
    session = Session(weights, Placement(device="cpu").resolve(), Limits(28 * 28, 200704, max_new_tokens=2))
    frames = [Image.new("RGB", (112, 84), (40 * index,) * 3) for index in range(4)]
    parts = [
        {"image": Image.new("RGB", (84, 56))},
        {"video": frames, "seconds": [0.0, 0.5, 1.0, 1.5]},
        {"text": "which colour?"},
    ]
    variants = [Variant("", "none", 1.0), Variant("", "random", 0.5)]
    for answer in (session.answer(parts, variants[1]), session.answer_all(parts, variants)[1]):
        assert (answer.visual_tokens, answer.visual_kept) == (6 + 2 * 12, 3 + 2 * 6)
        masks = Masks.from_text(answer.masks)
        assert [image.frame for image in masks.images] == [None, Frame(0, 0, 0.0), Frame(0, 1, 1.0)]
    told = session.adapter.encode(session.processor, [parts])["second_per_grid_ts"]
    for variant in variants:
        assert session.answer(parts, variant).seconds_per_step == float(told[0]) == 1.0, "of the baseline too"
    one_step = [{"video": frames[:2], "seconds": [0.0, 0.5]}, *parts[:1], *parts[2:]]
    assert session.answer(one_step, variants[0]).seconds_per_step is None
    assert session.answer(parts[:1] + parts[2:], variants[0]).seconds_per_step is None
    with pytest.raises(InputRefused, match="would leave the video as it is; show fewer frames"):
        session.answer(parts, Variant("", "downsample", 0.5))


def test_a_server_gets_no_video() -> None:
    with pytest.raises(InputRefused, match="videos are not sent to servers"):
        _messages([{"video": "a.mp4", "nframe": 8}, {"text": "what?"}])


def test_a_batch_keeps_the_frames_of_every_row(random_model: Path) -> None:
    """Videos of other lengths and paces, and a row without."""
    session = Session(
        locate("tiny", random_model), Placement(device="cpu").resolve(), Limits(28 * 28, 200704, max_new_tokens=2)
    )
    frame = Image.new("RGB", (112, 84))
    videos = [{"video": [frame] * n, "seconds": [pace * at for at in range(n)]} for n, pace in ((4, 0.5), (2, 1.0))]
    rows = [[videos[0], {"text": "what?"}], [{"image": frame}, {"text": "and?"}], [videos[1], {"text": "what?"}]]
    variants = [Variant("", "none", 1.0), Variant("", "random", 0.5)]
    for row, (_, answer) in zip(rows, session.answer_batch(rows, variants), strict=True):
        alone = session.answer(row, variants[1])
        assert answer.visual_kept == alone.visual_kept
        assert answer.seconds_per_step == alone.seconds_per_step
        images = [Masks.from_text(made.masks).images for made in (answer, alone)]
        assert [image.frame for image in images[0]] == [image.frame for image in images[1]]
