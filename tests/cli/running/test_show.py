"""`ivcp show` and `run.show()`: what is dark is what was dropped, and no text of anybody's is more than text."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import ivcp_eval
from ivcp_eval.cli import main
from ivcp_eval.interface import WHOLE, View
from ivcp_eval.interface.records.drawing import DARK, Drawing, Row
from ivcp_eval.interface.records.masks import CutMask, ImageCells, Masks
from tests.engine import tiny_models
from tests.videos import video

SVG = "{http://www.w3.org/2000/svg}"
WHITE = Image.new("RGB", (336, 336), "white")
HOSTILE = '<script>alert("1")</script>&]]>\x00\x1b[31m\ud800 <image href="http://example.org/x"/>'


def panels(svg: str) -> list[dict[str, int]]:
    """How many rectangles each panel has, by what they mark."""
    found = []
    for panel in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        if panel.get("transform"):
            marked = panel.findall(f"{SVG}g")
            found.append({group.get("class", ""): len(group.findall(f"{SVG}rect")) for group in marked})
    return found


def dark_cells(image: Image.Image, side: int, area: tuple[int, int, int, int]) -> int:
    """How many whole cells of a panel are dark; every pixel of a white picture must belong to one or be white."""
    pixels = np.asarray(image.crop(area).convert("L"))
    dark = pixels == round(255 * DARK)
    assert bool((dark | (pixels == 255)).all())
    cell = pixels.shape[0] // side
    blocks = dark.reshape(side, cell, side, cell).transpose(0, 2, 1, 3).reshape(side * side, -1)
    assert all(block.all() or not block.any() for block in blocks), "a cell is dark in part"
    return int(blocks.all(axis=1).sum())


def test_as_many_cells_are_dark_as_tokens_were_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded model; one cut, three cuts, and merged tokens."""
    WHITE.save(tmp_path / "white.png")
    command = ["show", str(tmp_path / "white.png"), "How many <b>circles</b>?", "--max-new-tokens", "3"]
    methods = ["--methods", "ivc_prune", "pyramiddrop", "visionzip", "--ratio", "0.25"]
    for name in ("kept.svg", "kept.png"):
        assert main([*command, *methods, "--device", "cpu", "--out", str(tmp_path / "new" / name)]) == 0
    out = capsys.readouterr().out
    assert out.count("(36 of 144 tokens)") == 6
    assert "tiny (144 of 144 tokens)" in out
    plain, ivc, *pyramid, zipped = panels((tmp_path / "new" / "kept.svg").read_text(encoding="utf-8"))
    assert (plain["dropped"], ivc["dropped"], ivc["merged"]) == (0, 108, 0)
    counts = [cut["dropped"] for cut in pyramid]
    assert counts == sorted(set(counts))
    assert counts[-1] == 108
    assert zipped["dropped"] == 108
    assert 0 < zipped["merged"] <= 108
    # The same places in the PNG: panels of 360 x 360, cells of 30 x 30, around merged ones a line of one pixel.
    image = np.asarray(Image.open(tmp_path / "new" / "kept.png").convert("L"))
    places = re.findall(r"translate\((\d+) (\d+)\)", (tmp_path / "new" / "kept.svg").read_text(encoding="utf-8"))
    assert len(places) == 6
    for (x, y), panel in zip(places, [plain, ivc, *pyramid, zipped], strict=True):
        dark = image[int(y) : int(y) + 360, int(x) : int(x) + 360] == round(255 * DARK)
        assert dark.sum() == panel["dropped"] * 30 * 30 - panel["merged"] * (30 * 30 - 28 * 28)


def test_what_an_eval_measures_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters, a budget, a method by its file; and a picture that a camera turned is shown upright."""
    tall = Image.new("RGB", (112, 336), "white")
    exif = tall.getexif()
    exif[0x0112] = 6  # a quarter turn
    tall.save(tmp_path / "turned.jpg", exif=exif)
    source = Path(ivcp_eval.__file__).parent / "methods" / "uniform.py"
    (tmp_path / "drawn.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    command = ["show", str(tmp_path / "turned.jpg"), "?", "--max-new-tokens", "2", "--device", "cpu", "--ratio", "0.5"]
    out = tmp_path / "kept.svg"
    assert main([*command, "--methods", str(tmp_path / "drawn.py"), "--out", str(out)]) == 0
    assert "__drawn__r0.5 (" in capsys.readouterr().out
    wide = re.search(r'<image[^>]* width="(\d+)" height="(\d+)"', out.read_text(encoding="utf-8"))
    assert wide is not None
    assert int(wide[1]) == 3 * int(wide[2])
    assert main([*command, "--methods", "fastv", "--set", "layer=3", "--out", str(out)]) == 0
    own = capsys.readouterr().out
    assert "__fastv__r0.5__layer=3 (" in own
    assert main([*command, "--methods", "fastv", "--budget", "layer_mean", "--out", str(out)]) == 0
    held = re.findall(r"__fastv__\S+ \((\d+) of (\d+)", capsys.readouterr().out)
    (kept, n), whole = map(int, held[0]), re.findall(r"fastv__r0.5\S* \((\d+) of", own)
    assert kept < int(whole[0]) < n, "two layers see all, so fewer stay for the same mean"


@pytest.mark.parametrize("family", tiny_models.names())
def test_a_run_of_any_family_shows_itself(family: str) -> None:
    model, make_inputs = tiny_models.build(family)
    extra = getattr(tiny_models.family(family), "PRUNE", {})
    with torch.no_grad(), ivcp_eval.prune(model, "random", 0.5, **extra) as run:
        model(**make_inputs("t5 i0 t9", "t4 i1 i0 t6"))
    for image, row in ((0, 0), (1, 1)):
        for view in run.masks(row).images[image].views:
            drawn = run.show(WHITE, image, row, view.name)
            (panel,) = panels(drawn._repr_svg_())
            assert panel["dropped"] == (~run.mask(image, row, view.name)).sum()
            assert panel["view"] == 0, "all these views show the whole picture"
            assert Image.open(io.BytesIO(drawn._repr_png_())).width < 500
    with pytest.raises(ValueError, match="there is no image 3"):
        run.show(WHITE, 3)
    assert panels(run.show().svg())[0]["dropped"] == (~run.mask()).sum(), "without a picture, too"


def test_padding_around_the_picture_is_drawn_too() -> None:
    """Cells beyond the picture are on grey, those on it on the picture."""
    covers = (0.0, -0.5, 1.0, 1.5)  # a wide picture in the middle of a square view
    image = ImageCells(16, (View("overview", np.arange(16).reshape(4, 4), covers),))
    masks = Masks((image,), (CutMask(2, np.arange(16) % 4 != 0),))
    drawing = Drawing(Image.new("RGB", (200, 100), "white"), [Row("a", masks=masks)], size=200)
    shown = np.asarray(drawing.raster().convert("L"))[12 + 17 : 12 + 17 + 200, 12 : 12 + 200]
    assert (shown[[25, 75, 125, 175], 25] == [31, 56, 56, 31]).all(), "the first column was dropped"
    assert (shown[[25, 75, 125, 175], 75] == [140, 255, 255, 140]).all()
    assert panels(drawing.svg()) == [{"dropped": 4, "merged": 0, "view": 0, "box": 0}]


def test_a_view_of_a_part_is_marked() -> None:
    """LLaVA-1.5 sees the middle square of a picture; cells lie there."""
    image = ImageCells(4, (View("picture", np.arange(4).reshape(2, 2), (0.25, 0.0, 0.75, 1.0)),))
    masks = Masks((image,), (CutMask(2, np.array([False, True, True, True])),))
    drawing = Drawing(Image.new("RGB", (200, 100), "white"), [Row("a", masks=masks)], size=200)
    assert panels(drawing.svg()) == [{"dropped": 1, "merged": 0, "view": 1, "box": 0}]
    shown = np.asarray(drawing.raster().convert("L"))[29 : 29 + 100, 12 : 12 + 200]
    assert (shown[[25, 25, 25, 75], [25, 75, 125, 75]] == [255, 56, 255, 255]).all()


def test_pixels_of_one_panel_are_its_cells() -> None:
    kept = np.random.default_rng(3).random(144) < 0.5
    image = ImageCells(144, (View("picture", np.arange(144).reshape(12, 12), WHOLE),))
    drawing = Drawing(WHITE, [Row("a", masks=Masks((image,), (CutMask(2, kept),)))])
    area = (12, 12 + 17, 12 + 360, 12 + 17 + 360)
    assert dark_cells(drawing.raster(), 12, area) == (~kept).sum()
    first = tuple(int(at) for at in np.argwhere(~kept.reshape(12, 12))[0])
    assert drawing.raster().getpixel((12 + 30 * first[1] + 15, 29 + 30 * first[0] + 15)) == (56, 56, 56)


def test_merged_cells_stay_outlined_at_later_cuts() -> None:
    image = ImageCells(4, (View("picture", np.arange(4).reshape(2, 2), WHOLE),))
    first = CutMask(1, np.array([True, True, True, False]), np.array([-1, -1, -1, 0]))
    second = CutMask(3, np.array([True, True, False, False]))
    drawn = panels(Drawing(WHITE, [Row("a", masks=Masks((image,), (first, second)))]).svg())
    assert [(panel["dropped"], panel["merged"]) for panel in drawn] == [(1, 1), (2, 1)]


def test_boxes_and_panels_of_any_shape_stay_on_the_page() -> None:
    """A box beyond the picture, a very tall picture, and more cells than a panel usually has pixels."""
    image = ImageCells(900, (View("picture", np.arange(900).reshape(900, 1), WHOLE),))
    masks = Masks((image,), (CutMask(2, np.arange(900) % 2 == 0),))
    rows = [
        Row("a name that is long", "an answer that is long", masks, box) for box in ((0.5, 0.5, 9, 9), (-3, 2, -2, 3))
    ]
    drawing = Drawing(Image.new("RGB", (4, 900), "white"), rows)
    assert drawing.raster().height > 4 * 900
    svg = ElementTree.fromstring(drawing.svg())
    width, height = float(svg.get("width", 0)), float(svg.get("height", 0))
    for text in svg.iter(f"{SVG}text"):
        assert float(text.get("x", 0)) + 7 * len(text.text or "") <= width + 12
    for group in svg.iter(f"{SVG}g"):
        for cell in group.findall(f"{SVG}rect"):
            x, y, w, h = (float(cell.get(name, "nan")) for name in ("x", "y", "width", "height"))
            assert x >= 0
            assert y >= 0
            assert h > 3 or group.get("class") == "box"
            assert x + w < width
            assert y + h < height


@pytest.mark.parametrize(
    "text", ["W" * 300, "m" * 40, "a word and " + "Q" * 60, "文" * 60, "many words " * 60], ids=len
)
def test_long_words_stay_over_their_panel(text: str) -> None:
    svg = ElementTree.fromstring(Drawing(WHITE, [Row(text, text), Row("b", "c")], size=150).svg())
    font, second = ImageFont.load_default(13), 12 + 150 + 12
    lines = [(float(line.get("x", 0)), line.text or "") for line in svg.iter(f"{SVG}text")]
    first = [line for x, line in lines if x == 12]
    assert max(12 + font.getlength(line) for line in first) <= second
    assert "".join("".join(first).split()).startswith("".join(text.split())[:20])
    assert any(line.endswith(" ...") for line in first) == (len(text) > 200)


def test_no_text_is_more_than_text() -> None:
    """Markup, control characters and half characters in names and answers."""
    svg = Drawing(WHITE, [Row(HOSTILE, HOSTILE, box=(0.1, 0.1, 0.4, 0.5))]).svg()
    tree = ElementTree.fromstring(svg.encode())
    assert {node.tag.removeprefix(SVG) for node in tree.iter()} == {
        *("svg", "title", "defs", "image", "rect", "g", "use", "text")
    }
    (image,) = tree.iter(f"{SVG}image")
    assert (image.get("href") or "").startswith("data:image/jpeg;base64,")
    assert '<script>alert("1")</script>' in "".join(node.text or "" for node in tree.iter(f"{SVG}text"))
    assert panels(svg)[0]["box"] == 1
    assert Drawing(WHITE, [Row(HOSTILE, "文字\n" * 400)]).raster().height < 900, "long answers are cut short"


def test_a_video_is_drawn_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of six frames three steps, as one picture of two by two."""
    video(tmp_path / "a.mp4", [i / 10 for i in range(6)], size=(112, 112))
    out = tmp_path / "kept.svg"
    command = [
        "show",
        str(tmp_path / "a.mp4"),
        "What?",
        "--nframe",
        "6",
        "--methods",
        "evs",
        "codecsight",
        "--out",
        str(out),
    ]
    assert main([*command, "--ratio", "0.5", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    found = re.findall(r"\((\d+) of (\d+) tokens\)", capsys.readouterr().out)
    plain, *pruned = panels(out.read_text(encoding="utf-8"))
    assert plain["dropped"] == 0
    assert [int(n) - int(kept) for kept, n in found[1:]] == [panel["dropped"] for panel in pruned]
    assert all(panel["dropped"] for panel in pruned)


def test_bad_requests_are_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ivcp_eval.runs.answering.session import Session

    monkeypatch.setattr(Session, "__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    WHITE.save(tmp_path / "white.png")
    picture, out = str(tmp_path / "white.png"), str(tmp_path / "kept.png")
    for arguments, words in (
        ((picture, "?", "--out", str(tmp_path / "kept.pdf")), "neither .png nor .svg"),
        ((str(tmp_path / "gone.png"), "?", "--out", out), "gone.png"),
        ((picture, "?", "--out", out, "--methods", "fastw"), "fastw"),
        ((picture, "?", "--out", out, "--methods", "./gone.py"), "gone.py"),
        ((picture, "?", "--out", out, "--set", "layr=3"), "layr"),
        ((picture, "?", "--out", out, "--budget", "half"), "half"),
    ):
        assert main(["show", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not Path(out).exists()
