"""`Masks`: which visual tokens of one prompt survived each cut, where they lie in the pictures, and its text form.

The text is base64 of zlib of one line of JSON and, after it, the packed bits: everything that it takes to draw the
masks without the model.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ivcp_eval.interface.method import Frame, View

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bits = npt.NDArray[np.bool_]

__all__ = ["CutMask", "ImageCells", "Masks"]

_LONGEST = 1 << 24  # bytes of an unpacked text, and cells of a view: far more than any prompt has


@dataclass(frozen=True)
class CutMask:
    """What one cut left of a prompt's V visual tokens.

    Attributes:
        layer: decoder layer before which it was made.
        kept: (V,) bool, alive after the cut.
        merged: (V,) int64, for each token that went into a survivor at this cut the one that got most of it, -1 for
            every other; None where nothing was merged.
    """

    layer: int
    kept: Bits
    merged: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class ImageCells:
    """One image of a prompt, or one grid step of a video.

    Attributes:
        n_tokens: its visual tokens in the prompt. views: where they lie (`ImageSpan.lay_out`); empty if not known.
        frame: which part of which video it shows; None for a picture.
    """

    n_tokens: int
    views: tuple[View, ...]
    frame: Frame | None = None


@dataclass(frozen=True)
class Masks:
    """One prompt. Its visual tokens are those of its images, one image after the other.

    Attributes:
        images: in the prompt's order. cuts: in the order of their layers; none where nothing was removed.
    """

    images: tuple[ImageCells, ...]
    cuts: tuple[CutMask, ...]

    def mask(self, image: int = 0, view: int | str = 0, cut: int = -1) -> Bits:
        """(rows, columns) bool: the cells of a view whose token is alive after a cut; all True where nothing was cut.

        Args:
            image: which image of the prompt.
            view: number or name (`View.name`). The default is the one of highest resolution that spans the picture.
            cut: which cut; the default is the last.

        Raises:
            ValueError: there is no such image, view or cut, or it is not known how the image's tokens lie.
        """
        import numpy as np

        cells, tokens = self.view(image, view).cells, self._tokens(image)
        if not self.cuts:
            return cells >= 0
        alive = self._cut(cut).kept[tokens]
        # A cell without a token has index -1 and would read the last one.
        shown: Bits = np.where(cells >= 0, alive[cells], False)
        return shown

    def merged(self, image: int = 0, view: int | str = 0, cut: int = -1) -> Bits:
        """(rows, columns) bool: the cells whose token was merged into a survivor at this cut; arguments as `mask`."""
        import numpy as np

        cells, tokens = self.view(image, view).cells, self._tokens(image)
        targets = self._cut(cut).merged if self.cuts else None
        if targets is None:
            return np.zeros(cells.shape, dtype=np.bool_)
        shown: Bits = np.where(cells >= 0, targets[tokens][cells] >= 0, False)
        return shown

    def kept(self, image: int = 0, cut: int = -1) -> int:
        """How many of an image's tokens are alive after a cut, those in no cell included."""
        tokens = self._tokens(image)
        return int(self._cut(cut).kept[tokens].sum()) if self.cuts else tokens.stop - tokens.start

    def of_frame(self, clip: int, index: int) -> int:
        """Which image of the prompt shows a grid step of a video, both counted from 0; ValueError if none does."""
        found = [image.frame and (image.frame.clip, image.frame.index) for image in self.images]
        if (clip, index) not in found:
            clips = [place[0] for place in found if place]
            sizes = ", ".join(f"clip {number} has {clips.count(number)}" for number in dict.fromkeys(clips))
            raise ValueError(
                f"the prompt has no frame {index} of clip {clip}; of its frames {sizes or 'there are none'}"
            )
        return found.index((clip, index))

    def view(self, image: int = 0, view: int | str = 0) -> View:
        """One view of an image; raises ValueError as `mask`."""
        self._tokens(image)
        views = self.images[image].views
        if not views:
            raise ValueError(
                f"it is not known how the {self.images[image].n_tokens} tokens of image {image} lie in the picture: "
                "give their grid, prune(..., grid=(rows, columns)), where there is no outer model to ask"
            )
        matching = [v for number, v in enumerate(views) if view in (number, v.name)]
        if not matching:
            raise ValueError(f"image {image} has no view {view!r}; it has {', '.join(v.name for v in views)}")
        return matching[0]

    def _tokens(self, image: int) -> slice:
        if not 0 <= image < len(self.images):
            raise ValueError(f"the prompt has {len(self.images)} images, there is no image {image}")
        start = sum(other.n_tokens for other in self.images[:image])
        return slice(start, start + self.images[image].n_tokens)

    def _cut(self, cut: int) -> CutMask:
        if not -len(self.cuts) <= cut < len(self.cuts):
            raise ValueError(f"there are {len(self.cuts)} cuts, there is no cut {cut}")
        return self.cuts[cut]

    # -- text -------------------------------------------------------------------------------------------------------

    def to_text(self) -> str:
        """ASCII without spaces; some hundred characters."""
        import numpy as np

        images = [
            [image.n_tokens, [_packed_view(view) for view in image.views], *_packed_frame(image.frame)]
            for image in self.images
        ]
        cuts, bits = [], []
        for cut in self.cuts:
            bits.append(np.packbits(cut.kept).tobytes())
            if cut.merged is not None:
                gone = cut.merged >= 0
                # Survivors are numbered among themselves, so that two bytes do for most.
                rank = np.searchsorted(cut.kept.nonzero()[0], cut.merged[gone])
                width = "<u2" if cut.kept.sum() <= 1 << 16 else "<u4"
                bits += [np.packbits(gone).tobytes(), rank.astype(width).tobytes()]
            cuts.append([cut.layer, int(cut.merged is not None)])
        head = json.dumps({"images": images, "cuts": cuts}, separators=(",", ":")).encode()
        return base64.b64encode(zlib.compress(head + b"\n" + b"".join(bits), 9)).decode()

    @classmethod
    def from_text(cls, text: str) -> Masks:
        """What `to_text` gave.

        Raises:
            ValueError: the text is something else.
        """
        try:
            unpack = zlib.decompressobj()
            raw = unpack.decompress(base64.b64decode(text, validate=True), _LONGEST)
            if unpack.unconsumed_tail or not unpack.eof:
                raise ValueError("it is cut off, or too long")
            return _read(raw)
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, zlib.error) as error:
            raise ValueError(f"{text[:40]!r}... is no record of kept tokens: {error}") from error


def _packed_view(view: View) -> list[Any]:
    """Name, rows, columns, rectangle, and the cells row by row as stretches (first token, how many); -1: no token."""
    import numpy as np

    flat = view.cells.ravel()
    before, after = flat[:-1], flat[1:]
    step = np.where((before < 0) | (after < 0), (before < 0) != (after < 0), after != before + 1)
    edges = [0, *(step.nonzero()[0] + 1).tolist(), flat.size]
    stretches = [number for start, end in pairwise(edges) for number in (int(flat[start]), end - start)]
    covers = None if view.covers is None else [round(edge, 5) for edge in view.covers]
    return [view.name, *view.cells.shape, covers, stretches]


def _packed_frame(frame: Frame | None) -> list[Any]:
    """Nothing of a picture, so that its text is as it was before there were videos."""
    return [] if frame is None else [[frame.clip, frame.index, frame.seconds]]


def _frame(packed: Sequence[Any]) -> Frame | None:
    if not packed:
        return None
    ((clip, index, seconds),) = packed
    return Frame(int(clip), int(index), None if seconds is None else float(seconds))


def _view(packed: Sequence[Any], n_tokens: int) -> View:
    import numpy as np

    name, rows, columns, covers, stretches = packed
    firsts, lengths = stretches[::2], stretches[1::2]
    if min(lengths) < 1 or sum(lengths) != rows * columns or rows * columns > _LONGEST:
        raise ValueError(f"a view of {rows} x {columns} cells is described with {sum(lengths)}")
    cells = np.concatenate(
        [np.full(n, -1) if first < 0 else np.arange(first, first + n) for first, n in zip(firsts, lengths, strict=True)]
    ).reshape(rows, columns)
    if cells.max() >= n_tokens:
        raise ValueError(f"a view of an image of {n_tokens} tokens shows token {cells.max()}")
    x0, y0, x1, y1 = covers or (0.0, 0.0, 1.0, 1.0)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"a view covers {covers}")
    return View(str(name), cells, covers and (float(x0), float(y0), float(x1), float(y1)))


def _read(raw: bytes) -> Masks:
    import numpy as np

    head, _, rest = raw.partition(b"\n")
    said = json.loads(head)
    images = tuple(
        ImageCells(int(n), tuple(_view(view, n) for view in views), _frame(frame))
        for n, views, *frame in said["images"]
    )
    n_tokens = sum(image.n_tokens for image in images)
    place = 0

    def take(kind: str, count: int) -> Any:
        nonlocal place
        values = np.frombuffer(rest, dtype=kind, count=count, offset=place)
        place += values.nbytes
        return values

    def bits() -> Bits:
        return np.unpackbits(take("u1", -(-n_tokens // 8)), count=n_tokens).astype(np.bool_)

    cuts = []
    for layer, has_merged in said["cuts"]:
        kept, merged = bits(), None
        if has_merged:
            gone = bits()
            merged = np.full(n_tokens, -1, dtype=np.int64)
            width = "<u2" if kept.sum() <= 1 << 16 else "<u4"
            merged[gone] = kept.nonzero()[0][take(width, int(gone.sum()))]
        cuts.append(CutMask(int(layer), kept, merged))
    if place != len(rest):
        raise ValueError(f"{len(rest) - place} bytes are left over")
    return Masks(images, tuple(cuts))
