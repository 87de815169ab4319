"""Box formats, Qwen's resizing rule and IoU."""

from __future__ import annotations

import itertools
import random

import pytest

from ivcp_eval.benchmarks.boxes import (
    FORMATS,
    QWEN_MAX_PIXELS,
    box_format,
    format_answer,
    iou,
    parse_answer,
    smart_resize,
)


def _sizes() -> list[tuple[int, int]]:
    rng = random.Random(7)
    edge = [1, 2, 13, 14, 15, 27, 28, 29, 41, 42, 43, 55, 56, 70, 98, 126, 427, 480, 640, 2000, 4000, 9000]
    return list(itertools.product(edge, edge)) + [(rng.randint(1, 6000), rng.randint(1, 6000)) for _ in range(5000)]


@pytest.mark.parametrize(
    ("factor", "min_pixels", "max_pixels"),
    [
        (28, 4 * 28 * 28, QWEN_MAX_PIXELS),
        (28, 56 * 56, 14 * 14 * 4 * 1280),
        (28, 1280 * 28 * 28, QWEN_MAX_PIXELS),
        (32, 65536, 16777216),
        (28, 3136, 3136),
    ],
)
def test_smart_resize_equals_transformers(factor: int, min_pixels: int, max_pixels: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs

    refused = 0
    for height, width in _sizes():
        try:
            expected = theirs(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match="aspect ratio"):
                smart_resize(height, width, factor, min_pixels, max_pixels)
            continue
        assert smart_resize(height, width, factor, min_pixels, max_pixels) == expected, (height, width)
    assert refused > 10


def test_ordinary_images_follow_plain_rounding() -> None:
    for height, width in itertools.product(range(100, 1000, 7), range(100, 1000, 11)):
        assert smart_resize(height, width) == (round(height / 28) * 28, round(width / 28) * 28)
    assert smart_resize(42, 126) == (56, 112)  # 1.5 and 4.5 round to even


@pytest.mark.parametrize("bad", [{"height": 0}, {"width": -1}, {"factor": 0}, {"min_pixels": 0}, {"max_pixels": 10}])
def test_smart_resize_refuses_nonsense(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        smart_resize(**({"height": 100, "width": 100} | bad))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("qwen2_5_vl", '```json\n[{"bbox_2d": [64, 48, 320, 240], "label": "cat"}]\n```', (0.1, 0.1, 0.5, 0.5)),
        ("qwen2_5_vl", '{"bbox_2d":[64,48,320,240]} {"bbox_2d":[0,0,1,1]}', (0.1, 0.1, 0.5, 0.5)),
        ("qwen3_vl", '[{"bbox_2d": [100, 200, 1000, 1000]}]', (0.1, 0.2, 1.0, 1.0)),
        ("internvl", "<ref>cat</ref><box>[[100, 200, 500, 999]]</box>", (0.1, 0.2, 0.5, 0.999)),
        ("internvl", "[100,200,500,999]", (0.1, 0.2, 0.5, 0.999)),
        ("deepseek_vl2", "<|ref|>cat<|/ref|><|det|>[[0, 111, 333, 999]]<|/det|>", (0.0, 111 / 999, 1 / 3, 1.0)),
        ("deepseek_vl2", "cat[[0, 111, 333, 999]]", (0.0, 111 / 999, 1 / 3, 1.0)),
        ("deepseek_vl2", "[1,2,3,4] <|det|>[[0, 111, 333, 999]]<|/det|>", (0.0, 111 / 999, 1 / 3, 1.0)),
        ("unit", "[0.1, .25, 0.5, 1.]", (0.1, 0.25, 0.5, 1.0)),
        ("unit", "[-0.1, 0, +0.5, 2]", (-0.1, 0.0, 0.5, 2.0)),
    ],
)
def test_parsing(name: str, text: str, expected: tuple[float, ...]) -> None:
    assert parse_answer(text, box_format(name), (640, 480)) == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot see it.",
        "[1, 2, 3]",
        '"bbox_2d": [1, 2, 3, four]',
        '"bbox_2d": [1, 2, 3',
        '"bbox_2d": [1 2 3 4]',
        "x1=1 y1=2 x2=3 y2=4",
        '"bbox_2d": [' + "9" * 400 + ", 1, 2, 3]",
        None,
        float("nan"),
        [1, 2, 3, 4],
    ],
)
def test_no_box_is_none_not_a_crash(name: str, text: object) -> None:
    assert parse_answer(text, FORMATS[name], (640, 480)) is None


def test_the_scale_is_declared_and_not_guessed() -> None:
    text = "[100, 200, 300, 400]"
    assert parse_answer(text, FORMATS["unit"]) == (100, 200, 300, 400)
    assert parse_answer("[[0, 0, 1, 1]]", FORMATS["unit"]) == (0, 0, 1, 1)
    assert parse_answer('"bbox_2d": [0, 0, 1, 1]', FORMATS["qwen3_vl"]) == (0, 0, 0.001, 0.001)
    assert parse_answer(text, FORMATS["qwen2_5_vl"], (640, 480)) is None  # no bbox_2d: not this model's syntax
    with pytest.raises(ValueError, match="name the frame"):
        parse_answer(text, FORMATS["qwen2_5_vl"])
    with pytest.raises(ValueError, match="unknown box format 'llava'; known: deepseek_vl2"):
        box_format("llava")


@pytest.mark.parametrize(("name", "full"), [("internvl", 1000), ("deepseek_vl2", 999)])
def test_fractions_are_read_where_the_published_evaluation_reads_them(name: str, full: int) -> None:
    assert parse_answer("[[0.1, 0.2, 0.5, 1.0]]", FORMATS[name]) == (0.1, 0.2, 0.5, 1.0)
    assert parse_answer("[[0, 0, 1, 1]]", FORMATS[name]) == (0, 0, 1, 1)
    assert parse_answer("[[0, 0, 2, 2]]", FORMATS[name]) == (0, 0, 2 / full, 2 / full)
    assert parse_answer("[[0.1, 0.2, 0.5]]", FORMATS[name]) is None


def test_qwen3_is_asked_for_boxes_in_its_own_words() -> None:
    from ivcp_eval.interface.registry import adapter

    asked = adapter("qwen3_vl").prompt("grounding", "the red cup", {})
    assert asked == (
        'Locate every object that matches the description "the red cup" in the image. '
        "Report bbox coordinates in JSON format."
    )
    assert adapter("qwen2_5_vl").prompt("grounding", "the red cup", {}) != asked


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_format_and_parse_are_inverse(name: str) -> None:
    rng, fmt = random.Random(3), FORMATS[name]
    for _ in range(200):
        frame = (28 * rng.randint(4, 40), 28 * rng.randint(4, 40))
        x1, x2 = sorted(rng.random() for _ in range(2))
        y1, y2 = sorted(rng.random() for _ in range(2))
        parsed = parse_answer(format_answer((x1, y1, x2, y2), fmt, frame), fmt, frame)
        half_step = (0.5 / frame[0], 0.5 / frame[1]) if fmt.in_pixels else (0.5 / 999, 0.5 / 999)
        assert parsed is not None
        for got, true, step in zip(parsed, (x1, y1, x2, y2), half_step * 2, strict=True):
            assert abs(got - true) <= step + 1e-9


def test_iou_by_hand() -> None:
    unit = (0.0, 0.0, 1.0, 1.0)
    assert iou(unit, unit) == 1.0
    assert iou(unit, (0.5, 0.0, 1.5, 1.0)) == pytest.approx(1 / 3)
    assert iou(unit, (0.25, 0.25, 0.75, 0.75)) == 0.25
    assert iou(unit, (1.0, 0.0, 2.0, 1.0)) == 0.0
    assert iou(unit, (1.0, 1.0, 0.0, 0.0)) == 0.0  # inverted
    assert iou((1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0)) == 0.0
    assert iou(unit, (0.3, 0.0, 0.3, 1.0)) == 0.0  # empty


def test_iou_agrees_with_counting_pixels() -> None:
    rng = random.Random(11)
    for _ in range(300):
        boxes = []
        for _ in range(2):
            x1, x2 = sorted(rng.sample(range(13), 2))
            y1, y2 = sorted(rng.sample(range(13), 2))
            boxes.append((x1, y1, x2, y2))
        cells = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in boxes]
        expected = len(cells[0] & cells[1]) / len(cells[0] | cells[1])
        assert iou(boxes[0], boxes[1]) == pytest.approx(expected)
        assert iou(boxes[1], boxes[0]) == pytest.approx(expected)
