"""Videos: what is a frame of which clip and when, in which order the tower's signals come, masks, forks, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.engine.fork import Ready, fork
from ivcp_eval.interface import Frame, registry
from ivcp_eval.interface.records.masks import Masks
from ivcp_eval.interface.variants import Variant
from tests.engine import tiny_models
from tests.engine.contract.cases import WITH_VIDEOS, Case
from tests.engine.contract.checks import close
from tests.engine.contract.toys import TOYS

FAMILIES = [name for name in tiny_models.names() if hasattr(tiny_models.family(name), "STEPS")]
MIXED = WITH_VIDEOS[1]


def frames_of(family: str, layout: str) -> Iterator[Frame | None]:
    """What each image of a row shows."""
    module: Any = tiny_models.family(family)
    clip = 0
    for kind, number in tiny_models.parse(layout):
        if kind == "image":
            yield None
        if kind == "video":
            pace = module.PACES[number] if hasattr(module, "PACES") else None
            for index in range(len(module.STEPS[number])):
                yield Frame(clip, index, None if pace is None else index * pace)
            clip += 1


def test_every_family_has_videos_or_a_reason() -> None:
    assert [name for name in registry.family_names() if not registry.adapter(name).no_videos] == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["forward", "generate", "beams"])
def test_a_span_knows_its_clip_frame_and_second(family: str, way: str) -> None:
    case, rows = Case(family, "none"), [layout for layout in MIXED for _ in range(1 + (way == "beams"))]
    inputs = case.inputs(*MIXED)
    with case.prune() as recording:
        if way == "forward":
            case.forward(inputs)
        else:
            case.generate(inputs, 1, num_beams=1 + (way == "beams"))
    ids = inputs["input_ids"].repeat_interleave(len(rows) // len(MIXED), dim=0)
    for row, layout, spans in zip(ids, rows, recording.run.images, strict=True):
        assert [span.frame for span in spans] == list(frames_of(family, layout))
        assert [span.columns.numel() for span in spans] == case.image_sizes(layout)
        columns = [int(column) for span in spans for column in span.columns]
        assert columns == case.is_visual(row).nonzero().flatten().tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_signals_of_the_tower_follow_the_prompt(family: str, way: str) -> None:
    """A video and a picture change places; the tower sees the same, and every token keeps its signals."""
    case = Case(family, "visionzip")
    inputs = case.inputs("t5 v0 t2 i1 t4")
    ids = inputs["input_ids"][0].tolist()
    picture, video = (
        range(ids.index(token), len(ids) - ids[::-1].index(token)) for token in case.placeholders
    )  # time stamps stand between the steps of some
    swapped = [*range(video.start), *picture, *range(video.stop, picture.start), *video, *range(picture.stop, len(ids))]
    heard = []
    for order in (list(range(len(ids))), swapped):
        moved = {k: v[:, order] if v.shape == inputs["input_ids"].shape else v for k, v in inputs.items()}
        with case.prune() as recording:
            case.forward(moved) if way == "forward" else case.generate(moved, 1)
        signals = recording.calls[0][0]
        columns = torch.tensor(order)[signals.visual]  # where the tokens stood before
        heard.append({name: signal[columns.argsort()] for name, signal in signals.vision.items()})
    assert heard[0]
    for name, signal in heard[0].items():
        close(heard[1][name], signal, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_lead_back_to_clip_frame_row_and_column(family: str) -> None:
    """Every kept token is one cell of one frame; where a model's positions are rows and columns, at their place."""
    case = Case(family, "toy_clips")
    inputs, positions = case.inputs(*MIXED), []
    hook = case.text_model.rotary_emb.register_forward_pre_hook(
        lambda _m, args, kwargs: positions.append(kwargs.get("position_ids", args[-1] if args else None)),
        with_kwargs=True,
    )
    try:
        with case.prune() as recording:
            case.forward(inputs)
    finally:
        hook.remove()
    run = recording.run
    for row, layout in enumerate(MIXED):
        masks = Masks.from_text(run.masks(row).to_text())
        assert [image.frame for image in masks.images] == list(frames_of(family, layout))
        kept, found = set(run.kept[row].tolist()), 0
        for frame in filter(None, frames_of(family, layout)):
            image = masks.of_frame(frame.clip, frame.index)
            span, view = run.images[row][image], masks.view(image)
            mask = run.mask(image, row)
            at = span.columns[view.cells[mask]]
            assert set(at.tolist()) == kept & set(span.columns[view.cells.ravel()].tolist())
            found += masks.kept(image)
            if positions[0].ndim == 3 and at.numel():
                cells = torch.from_numpy(mask).nonzero().T  # rows, columns
                sides = [axis.unique() for axis in positions[0][-2:, row, span.columns]]
                numbers = [side[cell] for side, cell in zip(sides, cells, strict=True)]
                assert torch.equal(positions[0][-2:, row, at], torch.stack(numbers))
                apart = getattr(tiny_models.family(family), "APART", {1})  # how far neighbours may stand
                assert {int(n) for side in sides for n in side.diff()} <= apart
        pictures = [i for i, image in enumerate(masks.images) if image.frame is None]
        assert found + sum(masks.kept(i) for i in pictures) == run.visual_kept[row]
    with pytest.raises(ValueError, match=r"no frame 0 of clip 2; of its frames clip 0 has \d+, clip 1 has \d+"):
        run.masks(1).of_frame(2, 0)
    assert "clip 1, frame 2" in run.show(image=run.masks(1).of_frame(1, 2), row=1).svg()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_equals_single_runs(family: str) -> None:
    model: Any = Case(family, "none").model
    inputs = tiny_models.make_inputs(family, *MIXED)
    named = (("none", 1.0), ("visionzip", 0.5), ("pyramiddrop", 0.3), ("ivc_prune", 0.4))
    variants = [*(Variant("", name, ratio) for name, ratio in named), Ready(TOYS["toy_clips"], 0.6)]
    for variant, answer in zip(variants, fork(model, variants, inputs, max_new_tokens=3), strict=True):
        with ivcp_eval.prune(model, variant.method, variant.ratio) as run:
            alone = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert [row.tolist() for row in answer.tokens] == alone.tolist()
        assert [row.tolist() for row in answer.run.kept] == [row.tolist() for row in run.kept]
        assert answer.run.visual_per_layer == run.visual_per_layer
        for row in range(len(MIXED)):
            assert answer.run.masks(row).to_text() == run.masks(row).to_text()


# -- frames that come as images ---------------------------------------------------------------------------------------


CLIP = [None, *(Frame(0, index, index / 2) for index in range(3))]


def three_frames(ratio: float, frames: Any, generate: bool = False, **options: Any) -> Any:
    """InternVL on a picture and three frames of 16 tokens."""
    model: Any = Case("internvl", "none").model
    inputs = tiny_models.make_inputs("internvl", "t2 i1 t2 i1 t1 i1 t1 i1 t6")
    with torch.no_grad(), ivcp_eval.prune(model, TOYS["toy_clips"], ratio, frames=frames) as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **options) if generate else model(**inputs)
    return run


def test_images_are_frames_where_the_user_says_so() -> None:
    for run in (three_frames(0.3, [CLIP]), three_frames(0.3, [CLIP], generate=True, num_beams=2)):
        for row in range(len(run.kept)):
            assert [span.frame for span in run.images[row]] == CLIP
            kept = [run.masks(row).kept(image) for image in range(4)]
            assert (kept[0], sum(kept[1:])) == (5, 14)  # round(0.3 * 16) and round(0.3 * 48)
    assert [three_frames(0.3, None).masks().kept(image) for image in range(4)] == [5, 5, 5, 5]
    model: Any = Case("internvl", "none").model
    inputs = tiny_models.make_inputs("internvl", "t2 i1 t2 i1 t1 i1 t1 i1 t6")
    variants = [Ready(TOYS["toy_clips"], ratio) for ratio in (0.3, 0.5)]
    answer, _ = fork(model, variants, inputs, layout={"frames": [CLIP]}, max_new_tokens=2)
    assert answer.run.masks().to_text() == three_frames(0.3, [CLIP]).masks().to_text()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([CLIP[1:]], r"frames name 3 images of row 0, which has 4"),
        ([CLIP, CLIP], r"frames were given for 2 rows, the prompt has 1"),
        ([], r"frames were given for 0 rows"),
        ([[None, Frame(1, 0), None, None]], r"got Frame\(clip=1.*expected Frame\(0, 0\)"),
        (
            [[Frame(0, 0), Frame(0, 2), None, None]],
            r"index=2.*expected Frame\(0, 1\) or Frame\(1, 0\)",
        ),
        ([[Frame(0, 0), None, Frame(0, 1), None]], r"a picture stands between frames of clip 0"),
    ],
)
def test_frames_that_do_not_fit_are_refused(frames: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        three_frames(0.5, frames)


def test_seconds_that_only_the_user_knows() -> None:
    """Qwen3-VL's inputs hold time stamps as text."""
    case = Case("qwen3_vl", "none")
    said = [Frame(0, index, 0.25 + index) for index in range(3)]
    with ivcp_eval.prune(case.model, "none", frames=[said]) as run:
        case.forward(case.inputs("t5 v0 t9"))
    assert [span.frame for span in run.images[0]] == said


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_model_that_prunes_its_own_videos_is_no_baseline() -> None:
    named = pytest.importorskip("transformers.models.nemotron_h_omni.configuration_nemotron_h_omni")
    config = named.NemotronH_Omni_Reasoning_V3_Config(video_pruning_rate=0.7)
    model: Any = SimpleNamespace(config=config)
    for method, ratio in (("none", 1.0), ("random", 0.5)):
        with pytest.raises(ValueError, match=r"nemotron_h_omni.* prunes its own videos .*video_pruning_rate=0.7"):
            ivcp_eval.prune(model, method, ratio).__enter__()


def test_a_video_that_is_not_the_prompts_is_refused() -> None:
    case = Case("qwen2_5_vl", "random")
    inputs = case.inputs("t5 v0 t9")
    inputs["video_grid_thw"] = torch.tensor([[2, 6, 10]])
    with pytest.raises(ValueError, match=r"videos that were passed have \[30\] tokens, .* hold \[45\]"):
        registry.adapter(case.family).image_spans(case.model, case.is_visual(inputs["input_ids"]), inputs)


def test_a_grid_that_nothing_tells_is_refused() -> None:
    case = Case("qwen2_5_vl", "random")
    inputs = case.inputs("t5 v0 t9")
    n = inputs["input_ids"].shape[1]
    features: Tensor = torch.zeros(45, 64)
    given = {"input_ids": inputs["input_ids"], "position_ids": torch.arange(n)[None]}
    given["mm_encoder_outputs"] = {"video": SimpleNamespace(pooler_output=[features])}
    with pytest.raises(ValueError, match="grid of a video of 45 tokens is not known"), case.prune():
        case.forward(given)
