"""What the cuts left, cell by cell: of every family, in every row, and as text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import ivcp_eval
from ivcp_eval.engine import Run
from ivcp_eval.engine.fork import fork
from ivcp_eval.interface import AbstractMethod, Cut, ModelFacts, Selection, Signals, ops
from ivcp_eval.interface.records.masks import CutMask, ImageCells, Masks
from ivcp_eval.interface.variants import Variant
from tests.engine import tiny_models

FAMILIES = tiny_models.names()
RAGGED = ("t5 i0 t9", "t4 i1 t3 i0 t6", "t12")
# Of the tiny models' images 0 and 1: the grids of their views, the default one first; tokens in no cell.
QWEN = [{"picture": (4, 6)}, {"picture": (3, 5)}], [0, 0]
LAYOUTS: dict[str, tuple[list[dict[str, tuple[int, int]]], list[int]]] = {
    "qwen2_5_vl": QWEN,
    "qwen2_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen2_5_vl_uhd": QWEN,
    "qwen2_5_vl_points": ([{"picture": (3, 4)}] * 2, [0, 0]),
    "llava": ([{"picture": (4, 4)}] * 2, [0, 0]),
    "llava_next": ([{"tiles": (4, 4), "overview": (2, 2)}, {"tiles": (2, 4), "overview": (2, 2)}], [4, 2]),
    "llava_onevision": ([{"tiles": (6, 3), "overview": (3, 3)}, {"tiles": (3, 6), "overview": (3, 3)}], [6, 3]),
    "internvl": ([{"tiles": (4, 8), "overview": (4, 4)}, {"picture": (4, 4)}], [0, 0]),
    # One separator, and a newline for each row of both views.
    "deepseek_vl2": ([{"tiles": (4, 2), "overview": (2, 2)}, {"tiles": (2, 4), "overview": (2, 2)}], [7, 5]),
}


def test_every_family_has_a_layout() -> None:
    assert set(LAYOUTS) == set(FAMILIES)


class Halves(AbstractMethod):
    """Keeps 0.75 and then 0.5 of every image, each time merging the dropped tokens into the survivor before them."""

    dense = False

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        return Cut(max(2, model.first_cut), 0.75), Cut(model.first_cut + 3, 0.5)

    def select(self, signals: Signals) -> Selection:
        score = torch.rand(signals.n_visual, generator=signals.generator)
        score[0] = 2  # a survivor before every token
        keep = ops.top_of_each_image(score, signals.images)
        group = torch.searchsorted(keep, torch.arange(signals.n_visual), right=True) - 1
        merge = ops.group_means(group, keep.numel())
        return Selection(keep, merge.to_dense() if self.dense else merge)


def pruned(family: str, method: Any, ratio: float, *layouts: str, generate: bool = False, **options: Any) -> Run:
    built, make_inputs = tiny_models.build(family)
    model: Any = built
    inputs = make_inputs(*layouts)
    extra = getattr(tiny_models.family(family), "PRUNE", {})
    with torch.no_grad(), ivcp_eval.prune(model, method, ratio, **extra) as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **options) if generate else model(**inputs)
    return run


def cells_are_the_tokens(run: Run, family: str, row: int, kinds: list[int]) -> None:
    """Every token of a row is in one cell of one view, or in none and counted as such; masks say what was kept."""
    grids, loose = LAYOUTS[family]
    masks = run.masks(row)
    assert [{view.name: view.cells.shape for view in image.views} for image in masks.images] == [
        grids[k] for k in kinds
    ]
    for cut in range(len(masks.cuts)):
        kept = 0
        for number, kind in enumerate(kinds):
            image = masks.images[number]
            shown = np.concatenate([view.cells.ravel() for view in image.views])
            assert len(set(shown.tolist())) == shown.size == image.n_tokens - loose[kind]
            first = sum(other.n_tokens for other in masks.images[:number])
            alive = masks.cuts[cut].kept[first : first + image.n_tokens]
            views = [run.mask(number, row, view.name, cut) for view in image.views]
            assert [mask.dtype for mask in views] == [np.bool_] * len(views)
            in_no_cell = np.setdiff1d(np.arange(image.n_tokens), shown)
            assert sum(int(mask.sum()) for mask in views) + alive[in_no_cell].sum() == masks.kept(number, cut)
            kept += masks.kept(number, cut)
        assert kept == masks.cuts[cut].kept.sum()


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_add_up_to_what_was_kept(family: str, generate: bool) -> None:
    """Two cuts, left padding, several images; where `generate` encodes the images before the forward, too."""
    run = pruned(family, Halves(), 0.5, *RAGGED, generate=generate)
    for row, kinds in enumerate(([0], [1, 0], [])):
        cells_are_the_tokens(run, family, row, kinds)
        assert [int(cut.kept[row].sum()) for cut in run.cuts][-1] == run.visual_kept[row]
        assert [cut.kept[row].numel() for cut in run.cuts] == [run.visual_prompt[row]] * 2
        assert [int(cut.kept[row].sum()) for cut in run.cuts] == [run.visual_per_layer[c.layer][row] for c in run.cuts]
        # What is gone stays gone.
        assert not bool((run.cuts[1].kept[row] & ~run.cuts[0].kept[row]).any())
    assert run.row(1).mask(1, view=0).tolist() == run.mask(1, row=1).tolist()
    with pytest.raises(ValueError, match="the prompt has 0 images"):
        run.mask(row=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpruned_masks_are_all_true(family: str) -> None:
    for run in (pruned(family, "none", 1.0, "t5 i0 t9"), pruned(family, "ivc_prune", 1.0, "t5 i0 t9")):
        for name, shape in LAYOUTS[family][0][0].items():
            assert run.mask(view=name).shape == shape
            assert run.mask(view=name).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_is_the_token_at_its_place(family: str) -> None:
    """The first and the last token of the default view, by the columns that the text model got."""
    run = pruned(family, "none", 1.0, "t5 i0 t9")
    view = run.masks().view()
    assert (np.diff(view.cells, axis=1)[:, : view.cells.shape[1] // 2 - 1] == 1).all()  # neighbours in a tile's row
    steps = {int(step) for step in np.diff(view.cells[:, 0])}
    width = view.cells.shape[1]
    newline = family in ("llava_next", "llava_onevision", "deepseek_vl2")
    # InternVL's tiles come one after the other: its rows of two tiles are not next to each other.
    assert steps == ({4} if family == "internvl" else {width + newline})


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_where_tokens_were_merged(dense: bool) -> None:
    """The survivor before each dropped token, at the cut where it was dropped."""
    method = Halves()
    method.__dict__["dense"] = dense
    run = pruned("qwen2_5_vl", method, 0.5, *RAGGED)
    before = [torch.ones(n, dtype=torch.bool) for n in run.visual_prompt]
    for cut in run.cuts:
        for row in range(2):
            kept, merged = cut.kept[row], cut.merged[row]
            assert merged is not None
            survivors = kept.nonzero().flatten()
            dropped = before[row] & ~kept
            assert bool(dropped.any())
            wanted = [int(survivors[survivors < token][-1]) for token in dropped.nonzero().flatten()]
            assert merged[dropped].tolist() == wanted
            assert set(merged[~dropped].tolist()) == {-1}
            before[row] = kept
        assert cut.merged[2] is None
    masks = run.masks(0)
    assert masks.merged(cut=0).sum() == 24 - 18
    assert not (masks.merged() & masks.mask()).any()


def test_merge_targets_of_weights_that_say_little() -> None:
    """Nothing above 0 is no target, of equals the first wins, and NaN is none; sparse as dense."""
    weights = torch.tensor([[0.0, 0.5, 0.2, -1.0, 0.0], [0.0, 0.5, 0.8, 0.0, 0.0]])
    for merge in (weights, weights.to_sparse()):
        assert ops.merge_targets(merge).tolist() == [-1, 0, 1, -1, -1]
    assert ops.merge_targets(torch.full((2, 2), torch.nan)).tolist() == [-1, -1]
    assert ops.merge_targets(torch.zeros(0, 3)).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_records_what_single_runs_record(family: str) -> None:
    built, make_inputs = tiny_models.build(family)
    model: Any = built
    inputs, extra = make_inputs(*RAGGED), getattr(tiny_models.family(family), "PRUNE", {})
    variants = [Variant("", name, ratio) for name, ratio in (("none", 1), ("pyramiddrop", 0.3), ("sparsevlm", 0.4))]
    answers = fork(model, variants, inputs, layout=extra, max_new_tokens=2)
    for answer, variant in zip(answers, variants, strict=True):
        with ivcp_eval.prune(model, variant.method, variant.ratio, **extra) as run:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert len(run.cuts) == (0 if variant.method == "none" else len(answer.run.cuts))
        for row in range(2):
            assert answer.run.masks(row).to_text() == run.masks(row).to_text()
    assert len(answers[1].run.cuts) > 1
    assert any(cut.merged[0] is not None for cut in answers[2].run.cuts)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
def test_beams_are_rows_of_their_own(family: str) -> None:
    run = pruned(family, Halves(), 0.5, "t5 i0 t9", "t4 i1 t3", generate=True, num_beams=2)
    one = pruned(family, Halves(), 0.5, "t5 i0 t9", "t4 i1 t3")
    assert [run.masks(row).to_text() for row in range(4)] == [one.masks(row // 2).to_text() for row in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_gives_the_masks_back(family: str) -> None:
    masks = pruned(family, Halves(), 0.5, *RAGGED).masks(1)
    again = Masks.from_text(masks.to_text())
    for image, other in zip(masks.images, again.images, strict=True):
        assert image.n_tokens == other.n_tokens
        for view, read in zip(image.views, other.views, strict=True):
            assert (view.name, view.cells.tolist()) == (read.name, read.cells.tolist())
            assert (view.covers is None) == (read.covers is None)
            assert view.covers is None or np.allclose(view.covers, read.covers or (), atol=1e-5)
    for cut, read_cut in zip(masks.cuts, again.cuts, strict=True):
        assert cut.layer == read_cut.layer
        assert cut.kept.tolist() == read_cut.kept.tolist()
        assert cut.merged is not None
        assert read_cut.merged is not None
        assert cut.merged.tolist() == read_cut.merged.tolist()
    assert again.to_text() == masks.to_text()


def test_text_is_short() -> None:
    """A picture of 1,296 tokens in a random mask, the worst there is, and in a block."""
    from ivcp_eval.interface import WHOLE, View

    rng = np.random.default_rng(0)
    image = ImageCells(1296, (View("picture", np.arange(1296).reshape(36, 36), WHOLE),))
    for kept, most in ((rng.random(1296) < 0.5, 360), (np.arange(1296) < 648, 150)):
        text = Masks((image,), (CutMask(16, kept),)).to_text()
        assert len(text) < most
        assert Masks.from_text(text).mask().ravel().tolist() == kept.tolist()


@pytest.mark.parametrize("text", ["", "not base64", "AAAA", "eJwDAAAAAAE="])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no record of kept tokens"):
        Masks.from_text(text)


def test_damaged_text_is_refused() -> None:
    """Bits that are missing, left over or point outside, and views that do not fit."""
    import base64
    import zlib

    def text(head: str, bits: bytes) -> str:
        return base64.b64encode(zlib.compress(head.encode() + b"\n" + bits)).decode()

    head = '{"images":[[4,[["picture",2,2,null,[0,4]]]]],"cuts":[[2,0]]}'
    assert Masks.from_text(text(head, b"\xc0")).mask().tolist() == [[True, True], [False, False]]
    bad = [(head, b""), (head, b"\xc0\xc0"), (head.replace("[2,0]", "[2,1]"), b"\xc0\x20\x09\x00")]
    bad += [(head.replace("[0,4]", other), b"\xc0") for other in ("[1,4]", "[0,3]", "[0,-4]", "[]")]
    bad += [(head.replace("null", "[1,0,0,1]"), b"\xc0"), ("{}", b""), ("[" * 9999, b"")]
    huge = head.replace("2,2,null,[0,4]", "40000,40000,null,[-1,1600000000]")
    for broken in [*bad, (huge, b"\xc0")]:
        with pytest.raises(ValueError, match="is no record of kept tokens"):
            Masks.from_text(text(*broken))
    bomb = base64.b64encode(zlib.compress(b"[" * (1 << 25))).decode()
    with pytest.raises(ValueError, match="too long"):
        Masks.from_text(bomb)


def test_views_say_what_they_show() -> None:
    """Whole pictures where the processor stretches; padding around the picture beyond 0..1."""
    run = pruned("deepseek_vl2", "none", 1.0, "t5 i0 t9")  # 60 x 40 on 42 x 84 (w, h) of tiles, and on 42 x 42
    tiles, overview = run.masks().images[0].views
    assert tiles.covers == pytest.approx((0, -1, 1, 2))
    # 28 of 42 rows show the picture; the 2 x 2 cells of 28 pixels reach to pixel 56.
    assert overview.covers == pytest.approx((0, -7 / 28, 56 / 42, 49 / 28))
    for family in ("qwen2_5_vl", "llava_next", "internvl"):
        assert {v.covers for v in pruned(family, "none", 1.0, "t5 i0 t9").masks().images[0].views} == {(0, 0, 1, 1)}


def test_tiles_that_lie_unknown_are_shown_alone() -> None:
    model, make_inputs = tiny_models.build("internvl")
    with torch.no_grad(), ivcp_eval.prune(model, "random", 0.5) as run:
        model(**make_inputs("t5 i0 t9"))
    assert [view.name for view in run.masks().images[0].views] == ["overview", "tile 1", "tile 2"]
    assert sum(run.mask(view=name).sum() for name in ("overview", "tile 1", "tile 2")) == run.visual_kept[0]
    with pytest.raises(ValueError, match="has no view 'tiles'; it has overview, tile 1, tile 2"):
        run.mask(view="tiles")


def test_a_mask_of_ones_own_needs_a_grid() -> None:
    model, make_inputs = tiny_models.build("llava")
    inputs = make_inputs("t5 i0 t9")
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[0, 2:8] = True
    with torch.no_grad(), ivcp_eval.prune(model, "random", 0.5, image_mask=mask) as run:
        model(**inputs)
    with pytest.raises(ValueError, match=r"not known how the 6 tokens of image 0 lie in the picture: give their grid"):
        run.mask()
    assert run.masks().kept() == 3
    with torch.no_grad(), ivcp_eval.prune(model, "random", 0.5, image_mask=mask, grid=(2, 3)) as run:
        model(**inputs)
    assert (run.mask().shape, run.mask().sum()) == ((2, 3), 3)
    with pytest.raises(ValueError, match="there are 1 cuts, there is no cut 1"):
        run.mask(cut=1)


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (336, 336)])
@pytest.mark.parametrize("pads", [False, True])
def test_llava_shows_the_middle_square_or_pads(size: tuple[int, int], pads: bool) -> None:
    """By a picture whose pixels say where they are, through transformers' own processor."""
    from PIL import Image
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    from ivcp_eval.interface.registry import adapter

    images = LlavaImageProcessor(do_pad=pads, do_normalize=False, do_rescale=False)
    x0, y0, x1, y1 = adapter("llava").covered(type("P", (), {"image_processor": images})(), size) or (0, 0, 0, 0)
    ramp = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(1, 255, size[0])[None, :]
    ramp[..., 1] = np.linspace(1, 255, size[1])[:, None]
    seen = images(Image.fromarray(ramp), return_tensors="pt")["pixel_values"][0].float()
    side = seen.shape[-1]
    for place in (0.3, 0.5, 0.7):  # as a share of what the model sees
        across, down = x0 + place * (x1 - x0), y0 + place * (y1 - y0)
        at = math.floor(place * side)
        assert float(seen[0, side // 2, at]) == pytest.approx(1 + 254 * across, abs=3)
        assert float(seen[1, at, side // 2]) == pytest.approx(1 + 254 * down, abs=3)


def test_stretches_of_cells_are_read_in_order() -> None:
    """Cells without a token between stretches, as no family has them today."""
    from ivcp_eval.interface import View

    cells = np.array([[-1, -1, 0], [1, 5, -1], [-1, 2, 3]])
    text = Masks((ImageCells(6, (View("picture", cells),)),), ()).to_text()
    (view,) = Masks.from_text(text).images[0].views
    assert view.cells.tolist() == cells.tolist()


def placed(height: int, width: int, side: int) -> torch.Tensor:
    """(height * width, side * side, 2): of every patch of every tile, its row and column in the whole picture."""
    rows, columns = torch.meshgrid(torch.arange(height * side), torch.arange(width * side), indexing="ij")
    grid = torch.stack((rows, columns), dim=-1).unflatten(0, (height, side)).unflatten(2, (width, side))
    return grid.transpose(1, 2).flatten(0, 1).flatten(1, 2)


@pytest.mark.parametrize("head", [True, False], ids=["thumbnail first", "thumbnail last"])
@pytest.mark.parametrize("tiles", [(1, 1), (3, 2), (1, 4)])
def test_deepseeks_cells_lie_as_its_model_packs_them(tiles: tuple[int, int], head: bool) -> None:
    from ivcp_eval.interface import ImageSpan
    from model_adapters.deepseek_vl2.layout import assemble, lay_out

    side, none = 3, torch.tensor([-1, -1])
    views = torch.cat((placed(1, 1, side), placed(tiles[1], tiles[0], side)))
    tokens = assemble(views, tiles, none, none, head)
    tiled, overview = lay_out(side, head, None, 42, 14, ImageSpan(torch.arange(len(tokens)), tiles=tiles))
    for view in (tiled, overview):
        rows, columns = view.cells.shape
        wanted = [[[row, column] for column in range(columns)] for row in range(rows)]
        assert tokens[torch.from_numpy(view.cells)].tolist() == wanted
    assert tiled.cells.shape == (tiles[1] * side, tiles[0] * side)


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_llava_nexts_cells_lie_as_its_model_packs_them(kind: int) -> None:
    """Rows and columns of what is left of the padded grid increase by one; the newline is in no cell."""
    built, make_inputs = tiny_models.build("llava_next")
    model: Any = built
    inputs = make_inputs(f"t5 i{kind} t9")
    (size,) = inputs["image_sizes"]
    height, width = (int(n) for n in model.model.config.image_grid_pinpoints[{0: 2, 1: 0, 2: 1, 3: 0}[kind]])
    features = torch.cat((placed(1, 1, 2), placed(height // 28, width // 28, 2))).float()
    newline = torch.tensor([-1.0, -1.0])
    (tokens,), _ = model.model.pack_image_features([features], size[None], "default", image_newline=newline)
    for view in pruned("llava_next", "none", 1.0, f"t5 i{kind} t9").masks().images[0].views:
        seen = tokens[torch.from_numpy(view.cells)]
        assert (seen >= 0).all()
        assert (seen.diff(dim=0)[..., 0] == 1).all()
        assert (seen.diff(dim=1)[..., 1] == 1).all()
        assert (seen.diff(dim=0)[..., 1] == 0).all()
