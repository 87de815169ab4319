"""What a prune block reports: which tokens survived, and what was really processed and cached."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ivcp_eval.interface import ImageSpan
from ivcp_eval.interface.records.masks import CutMask, ImageCells, Masks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

    from ivcp_eval.interface.records.drawing import Drawing


@dataclass(frozen=True)
class CutRecord:
    """What one cut left, per batch row of V visual tokens in the prompt. All on CPU.

    Attributes:
        layer: decoder layer before which it was made.
        kept: (V,) bool, alive after the cut.
        merged: (V,) int64, for each token that went into a survivor at this cut the one that got most of it (the
            largest merge weight), -1 for every other; None in rows where nothing was merged.
    """

    layer: int
    kept: tuple[Tensor, ...]
    merged: tuple[Tensor | None, ...]


@dataclass
class Run:
    """Measured facts of the last prefill inside a `prune` block, and of the cache as it grew since.

    Attributes:
        method: registered name. ratio: the retention ratio asked for.
        kept: per batch row, the sorted columns of ``input_ids`` (int64, CPU) of every token that survived the last
            cut, text included, padding not. Rows are those of the prefill, so beams count separately.
        visual_prompt: visual tokens per row in the prompt.
        visual_kept: visual tokens per row after the last cut.
        visual_per_layer: per decoder layer, visual tokens per row that it processed in the prefill.
        visual_cached: per decoder layer, visual tokens per row in its KV cache after the prefill.
        kv_lengths: physical length of each layer's cache, appended tokens and padding slots included; empty
            without a cache.
        prefills: how many pruned or image-bearing prefills ran in the block.
        visual_attended: per row and forward after the prefill, how many visual tokens its layers attended to, all
            layers together; empty unless a method masks single steps.
        visual_pairs, visual_mlp: per decoder layer, how many pairs of visual tokens per row its attention looked at in
            the prefill (mean over heads, whole numbers) and how many visual tokens its MLP processed, as a real
            implementation would; empty unless a method leaves some out, which here are computed all the same.
        key_share: share of the key channels of visual tokens that the method would store, where it compresses these;
            no memory is freed here.
        nonfinite_scores: per row, how many scores of visual tokens were NaN or infinite, over all cuts. Such scores
            rank nothing: a method that gives them is broken on that input, or half precision overflowed.
        images: per row, its images in the prompt. cuts: what each cut that removed tokens left.
    """

    method: str
    ratio: float
    kept: list[Tensor] = field(default_factory=list)
    visual_prompt: list[int] = field(default_factory=list)
    visual_kept: list[int] = field(default_factory=list)
    visual_per_layer: list[list[int]] = field(default_factory=list)
    visual_cached: list[list[int]] = field(default_factory=list)
    kv_lengths: list[int] = field(default_factory=list)
    prefills: int = 0
    nonfinite_scores: list[int] = field(default_factory=list)
    visual_attended: list[list[int]] = field(default_factory=list)
    visual_pairs: list[list[int]] = field(default_factory=list)
    visual_mlp: list[list[int]] = field(default_factory=list)
    key_share: float = 1.0
    images: list[list[ImageSpan]] = field(default_factory=list)
    cuts: list[CutRecord] = field(default_factory=list)

    def start(
        self, image_mask: Tensor, alive: Sequence[Tensor], spans: Sequence[list[ImageSpan]], n_layers: int
    ) -> None:
        """Begin the facts of a prefill, as if nothing were removed.

        Args:
            image_mask: (B, S) bool, the visual tokens. alive: per row, the columns that are not padding.
            spans: per row its images; empty where no row has any.
        """
        self.kept = list(alive)
        self.visual_prompt = self.visual_kept = image_mask.sum(1).tolist()
        self.visual_per_layer = [self.visual_prompt] * n_layers
        self.visual_cached = [self.visual_prompt] * n_layers
        self.nonfinite_scores = [0] * image_mask.shape[0]
        self.visual_attended = [[] for _ in range(image_mask.shape[0])]
        self.visual_pairs, self.visual_mlp = [], []
        self.images = list(spans) or [[] for _ in alive]
        self.cuts = []
        self.prefills += 1

    def count_nonfinite(self, row: int, count: int) -> None:
        """Add to a row's `nonfinite_scores`; the first time in a block, warn."""
        if count and not any(self.nonfinite_scores):
            warnings.warn(
                f"method {self.method!r} gave {count} scores that are not finite; they rank lowest, by position",
                stacklevel=2,
            )
        self.nonfinite_scores[row] += count

    def count_attended(self, row: int, layer: int, count: int) -> None:
        """Add what one layer attends to in the forward that is running."""
        if layer == 0:
            self.visual_attended[row].append(0)
        self.visual_attended[row][-1] += count

    def analytic_share(self, row: int, steps: int) -> float | None:
        """Share of the row's visual KV cache that a real implementation of the method would read while decoding.

        Measured of what single steps attended to (the first ``steps`` after the prefill), computed of compressed keys;
        in both cases nothing is freed here. None for a method whose cache is what `visual_cached` says.
        """
        attended = self.visual_attended[row][:steps]
        if not attended and self.key_share == 1:
            return None
        whole = len(attended) * sum(layer[row] for layer in self.visual_cached)
        return (sum(attended) / whole if attended else 1.0) * (1 + self.key_share) / 2

    def row(self, index: int) -> Run:
        """The facts of one row alone."""
        return replace(
            self,
            kept=[self.kept[index]],
            visual_prompt=[self.visual_prompt[index]],
            visual_kept=[self.visual_kept[index]],
            visual_per_layer=[[layer[index]] for layer in self.visual_per_layer],
            visual_cached=[[layer[index]] for layer in self.visual_cached],
            nonfinite_scores=[self.nonfinite_scores[index]],
            visual_attended=[self.visual_attended[index]],
            visual_pairs=[[layer[index]] for layer in self.visual_pairs],
            visual_mlp=[[layer[index]] for layer in self.visual_mlp],
            images=[self.images[index]],
            cuts=[CutRecord(cut.layer, (cut.kept[index],), (cut.merged[index],)) for cut in self.cuts],
        )

    def masks(self, row: int = 0) -> Masks:
        """What the cuts left of one row's images, to be kept or drawn without the model."""
        images = tuple(ImageCells(span.columns.numel(), span.lay_out(span), span.frame) for span in self.images[row])
        cuts = []
        for cut in self.cuts:
            merged = cut.merged[row]
            cuts.append(CutMask(cut.layer, cut.kept[row].numpy(), None if merged is None else merged.numpy()))
        return Masks(images, tuple(cuts))

    def mask(self, image: int = 0, row: int = 0, view: int | str = 0, cut: int = -1) -> npt.NDArray[np.bool_]:
        """(rows, columns) bool: the cells of an image whose token is alive after a cut, as `Masks.mask`.

        Args:
            image: of the row, each grid step of a video being one (`Masks.of_frame`). row: of the prefill's batch.
            view: number or name; the default is the one of highest resolution that spans the whole picture.
            cut: which of `cuts`; the default is the last. All cells are alive where nothing was cut.
        """
        return self.masks(row).mask(image, view, cut)

    def show(
        self, picture: Image | None = None, image: int = 0, row: int = 0, view: int | str = 0, size: int = 360
    ) -> Drawing:
        """One image with the cells that each cut kept; a notebook shows it, and it has ``save(path)``.

        Args:
            picture: the PIL image; without it the cells are drawn on an empty one.
            image, row, view: as in `mask`. size: pixels of the longer side of a panel.
        """
        from ivcp_eval.interface.records.drawing import Drawing, Row

        masks = self.masks(row)
        masks.view(image, view)  # says what is wrong with them
        return Drawing(picture, [Row(f"{self.method} {self.ratio:g}", masks=masks)], image, view, size)

    @property
    def layer_mean_ratio(self) -> float:
        """Measured visual tokens processed, averaged over layers and rows, over those of the prompt."""
        return _mean_share(self.visual_per_layer, self.visual_prompt)

    @property
    def cache_ratio(self) -> float:
        """Measured visual tokens in the cache, averaged over layers and rows, over those of the prompt."""
        return _mean_share(self.visual_cached, self.visual_prompt)

    @property
    def kept_ratio(self) -> float:
        """Measured visual tokens after the last cut over those of the prompt."""
        return _mean_share([self.visual_kept], self.visual_prompt)


def _mean_share(per_layer: list[list[int]], prompt: list[int]) -> float:
    total = sum(prompt) * len(per_layer)
    return sum(map(sum, per_layer)) / total if total else float("nan")
