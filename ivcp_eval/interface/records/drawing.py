"""Pictures of what was kept: for each variant one panel a cut, as PNG or SVG, with Pillow alone.

A dropped cell is darkened, one whose token was merged into a survivor is outlined as well. Boxes are orange.
"""

from __future__ import annotations

import base64
import html
import io
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.interface.method import WHOLE, Rectangle
from ivcp_eval.interface.records.masks import Masks

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SUFFIXES", "Drawing", "Row", "checked_path"]

SUFFIXES = (".png", ".svg")
DARK = 0.22  # of its brightness is left to a dropped cell
MERGED, BOX, EDGE, PADDING = "#35c9ff", "#ff9d00", "#e0218a", "#8c8c8c"
_SMALLEST, _NARROWEST = 4, 140  # pixels of a cell, and of the room for the text above and below a panel
_WIDTH, _MARGIN, _LINE, _FONT, _MOST_LINES = 1200, 12, 17, 13, 8
_WIDER = 1.15  # than Pillow's font, of that size, are those that show an SVG
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Pixels = tuple[int, int, int, int]
"""(left, top, right, bottom), the last two not included."""


@dataclass(frozen=True)
class Row:
    """What one variant made of the picture.

    Attributes:
        title: its name. text: its answer. masks: what it kept; None where that is not known.
        box: that it answered, as fractions of the picture.
    """

    title: str
    text: str = ""
    masks: Masks | None = None
    box: Rectangle | None = None


@dataclass(frozen=True)
class Drawing:
    """Variants with their panels; a notebook shows it as it is.

    Attributes:
        picture: PIL image in RGB; None draws the cells on an empty one.
        rows: the variants. image, view: of `Masks.mask`.
        size: pixels of the longer side of a panel; it has more where a cell would get less than 4.
    """

    picture: Image | None
    rows: Sequence[Row]
    image: int = 0
    view: int | str = 0
    size: int = 360

    def save(self, path: str | Path) -> None:
        """Write a ``.png`` or ``.svg`` file; raises ValueError for another."""
        path = checked_path(path)
        if path.suffix.lower() == ".svg":
            path.write_text(self.svg(), encoding="utf-8")
        else:
            path.write_bytes(self.png())

    def png(self) -> bytes:
        """The drawing as a PNG file."""
        buffer = io.BytesIO()
        self.raster().save(buffer, "PNG")
        return buffer.getvalue()

    def raster(self) -> Image:
        """The drawing as a PIL image in RGB."""
        from PIL import Image, ImageDraw, ImageFont

        page = _lay_out(self)
        sheet = Image.new("RGB", (page.width, page.height), "white")
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
        for panel in page.panels:
            shown = page.canvas.copy()
            for cell in panel.dropped:
                shown.paste(shown.crop(cell).point(lambda value: round(value * DARK)), cell[:2])
            over = ImageDraw.Draw(shown)
            for cells, colour, width in panel.outlines():
                for x0, y0, x1, y1 in cells:
                    over.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=width)
            sheet.paste(shown, (panel.x, panel.y))
        for x, y, text, bold in page.lines:
            # Pillow's own font has the Latin script only; SVG has what the reader's system has.
            pen.text((x, y - _FONT), text, fill="black", font=font, stroke_width=0.3 if bold else 0)
        return sheet

    def svg(self) -> str:
        """The drawing as SVG; the picture is in it once, as JPEG."""
        page = _lay_out(self)
        buffer = io.BytesIO()
        page.canvas.save(buffer, "JPEG", quality=88)
        data = base64.b64encode(buffer.getvalue()).decode()
        name = f"picture-{zlib.crc32(buffer.getvalue()):08x}"  # several drawings may stand in one document
        width, height = page.canvas.size
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{page.width}" height="{page.height}" '
            f'viewBox="0 0 {page.width} {page.height}" role="img" font-family="sans-serif" font-size="{_FONT}">',
            f"<title>{_escaped('; '.join(row.title for row in self.rows))}</title>",
            f'<defs><image id="{name}" width="{width}" height="{height}" href="data:image/jpeg;base64,{data}"/></defs>',
            '<rect width="100%" height="100%" fill="#fff"/>',
        ]
        for panel in page.panels:
            parts.append(f'<g transform="translate({panel.x} {panel.y})"><use href="#{name}"/>')
            parts.append(f'<g class="dropped" fill="#000" fill-opacity="{1 - DARK:g}" shape-rendering="crispEdges">')
            parts += [_rectangle(cell) for cell in panel.dropped]
            parts.append("</g>")
            for (cells, colour, stroke), kind in zip(panel.outlines(), ("merged", "view", "box"), strict=True):
                parts.append(f'<g class="{kind}" fill="none" stroke="{colour}" stroke-width="{stroke}">')
                parts += [_rectangle(cell, stroke / 2) for cell in cells]
                parts.append("</g>")
            parts.append("</g>")
        for x, y, text, bold in page.lines:
            weight = ' font-weight="bold"' if bold else ""
            parts.append(f'<text x="{x}" y="{y}"{weight}>{_escaped(text)}</text>')
        return "\n".join([*parts, "</svg>\n"])

    def _repr_png_(self) -> bytes:
        return self.png()

    def _repr_svg_(self) -> str:
        return self.svg()


def checked_path(path: str | Path) -> Path:
    """The path of a drawing; raises ValueError unless its name ends in one of `SUFFIXES`."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is neither .png nor .svg; drawings are one of these")
    return path


@dataclass(frozen=True)
class _Panel:
    """One cut of one row, at (x, y) of the page; cells in pixels of the canvas."""

    x: int
    y: int
    dropped: list[Pixels]
    merged: list[Pixels]
    edge: list[Pixels]
    box: list[Pixels]

    def outlines(self) -> list[tuple[list[Pixels], str, int]]:
        """(rectangles, colour, width), those on top last."""
        return [(self.merged, MERGED, 1), (self.edge, EDGE, 1), (self.box, BOX, 3)]


@dataclass(frozen=True)
class _Page:
    """Everything in its place.

    Attributes:
        canvas: the picture and, where a view reaches beyond it, padding. lines: (x, baseline, text, bold).
    """

    width: int
    height: int
    canvas: Image
    panels: list[_Panel]
    lines: list[tuple[int, int, str, bool]]


class _Canvas:
    """The picture in pixels, large enough for every view."""

    def __init__(self, drawing: Drawing) -> None:
        from PIL import Image

        shown = [_covers(drawing, row.masks) or WHOLE for row in drawing.rows]
        left, top, right, bottom = zip(WHOLE, *shown, strict=True)
        self.frame = min(left), min(top), max(right), max(bottom)
        picture = drawing.picture or Image.new("RGB", _blank_size(drawing), "#dcdcdc")
        across, down = self.frame[2] - self.frame[0], self.frame[3] - self.frame[1]
        longest = max(drawing.size, _SMALLEST * _finest(drawing))
        scale = longest / max(picture.width * across, picture.height * down)
        self.width = max(1, round(picture.width * across * scale))
        self.height = max(1, round(picture.height * down * scale))
        x0, y0, x1, y1 = self.pixels(WHOLE)
        self.canvas = Image.new("RGB", (self.width, self.height), PADDING)
        fitted = picture.convert("RGB").resize((max(1, x1 - x0), max(1, y1 - y0)), Image.Resampling.BICUBIC)
        self.canvas.paste(fitted, (x0, y0))

    def pixels(self, place: Rectangle) -> Pixels:
        """Where a rectangle of the picture is."""
        x0, y0, x1, y1 = self.frame
        across, down = self.width / (x1 - x0), self.height / (y1 - y0)
        left, right = (round((x - x0) * across) for x in place[::2])
        top, bottom = (round((y - y0) * down) for y in place[1::2])
        return left, top, right, bottom

    def inside(self, place: Rectangle) -> Pixels:
        """`pixels`, cut off at the edges: models answer with boxes that reach beyond the picture."""
        left, top, right, bottom = self.pixels(place)
        x0, y0 = min(max(0, left), self.width - 1), min(max(0, top), self.height - 1)
        return x0, y0, min(max(x0 + 1, right), self.width), min(max(y0 + 1, bottom), self.height)

    def cells(self, where: Any, covers: Rectangle) -> list[Pixels]:
        """The True cells of (rows, columns) bool, row by row."""
        x0, y0, x1, y1 = covers
        rows, columns = where.shape
        wide, high = (x1 - x0) / columns, (y1 - y0) / rows
        return [
            self.pixels((x0 + c * wide, y0 + r * high, x0 + (c + 1) * wide, y0 + (r + 1) * high))
            for r, c in zip(*(axis.tolist() for axis in where.nonzero()), strict=True)
        ]


def _lay_out(drawing: Drawing) -> _Page:
    canvas = _Canvas(drawing)
    step = max(canvas.width, _NARROWEST) + _MARGIN  # texts stand there, too
    panels: list[_Panel] = []
    lines: list[tuple[int, int, str, bool]] = []
    y, widest = _MARGIN, 0
    for band in _bands(drawing.rows, max(1, _WIDTH // step)):
        texts, x = [], _MARGIN
        for row in band:
            room = len(_cuts(row)) * step
            said = [(line, True) for line in _wrapped(row.title, room)]
            said += [(line, False) for line in _wrapped(row.text, room)]
            texts.append((x, said))
            x += room
        widest = max(widest, x)
        for left, said in texts:
            lines += [(left, y + _FONT + number * _LINE, text, bold) for number, (text, bold) in enumerate(said)]
        top = y + _LINE * max(len(said) for _, said in texts)
        captions = 0
        for row, (left, _) in zip(band, texts, strict=True):
            for number, cut in enumerate(_cuts(row)):
                at = left + number * step
                panels.append(_panel(drawing, canvas, row, cut, at, top))
                caption = _wrapped(_caption(drawing, row, cut), step)
                below = top + canvas.height + _FONT
                lines += [(at, below + line * _LINE, text, False) for line, text in enumerate(caption)]
                captions = max(captions, len(caption))
        y = top + canvas.height + captions * _LINE + 2 * _MARGIN
    return _Page(widest, y - _MARGIN, canvas.canvas, panels, lines)


def _bands(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """Rows side by side as long as they have at most so many panels."""
    bands: list[list[Row]] = []
    free = 0
    for row in rows:
        needed = len(_cuts(row))
        if needed > free:
            bands.append([])
            free = most
        bands[-1].append(row)
        free -= needed
    return bands


def _panel(drawing: Drawing, canvas: _Canvas, row: Row, cut: int | None, x: int, y: int) -> _Panel:
    box = [] if row.box is None else [canvas.inside(row.box)]
    covers = _covers(drawing, row.masks)
    if row.masks is None or covers is None:
        return _Panel(x, y, [], [], [], box)
    edge = [] if covers == canvas.frame else [canvas.pixels(covers)]
    if cut is None:
        return _Panel(x, y, [], [], edge, box)
    masks, image, view = row.masks, drawing.image, drawing.view
    dropped = ~masks.mask(image, view, cut) & (masks.view(image, view).cells >= 0)
    merged = sum(masks.merged(image, view, earlier) for earlier in range(cut + 1)) > 0
    return _Panel(x, y, canvas.cells(dropped, covers), canvas.cells(merged & dropped, covers), edge, box)


def _cuts(row: Row) -> Sequence[int | None]:
    return range(len(row.masks.cuts)) if row.masks is not None and row.masks.cuts else (None,)


def _covers(drawing: Drawing, masks: Masks | None) -> Rectangle | None:
    """What the view shows of the picture, all of it where that is not known; None where no cell is known."""
    if masks is None or not masks.images or not masks.images[drawing.image].views:
        return None
    return masks.view(drawing.image, drawing.view).covers or WHOLE


def _caption(drawing: Drawing, row: Row, cut: int | None) -> str:
    masks = row.masks
    if masks is None or not masks.images:
        return ""
    n, frame = masks.images[drawing.image].n_tokens, masks.images[drawing.image].frame
    shown = ""
    if frame is not None:
        time = "" if frame.seconds is None else f" at {frame.seconds:g} s"
        shown = f"clip {frame.clip}, frame {frame.index}{time}: "
    if cut is None:
        return f"{shown}{n} tokens, all kept"
    text = f"{shown}before layer {masks.cuts[cut].layer}: {masks.kept(drawing.image, cut)} of {n} tokens"
    views = masks.images[drawing.image].views
    if not views:
        return f"{text}; how they lie in the picture is not known"
    view = masks.view(drawing.image, drawing.view)
    if (view.cells >= 0).sum() < n:
        alive = masks.mask(drawing.image, drawing.view, cut)
        text += f", {alive.sum()} of {(view.cells >= 0).sum()} in the view drawn ({view.name})"
    if view.covers is None:
        text += "; which part of the picture they show is not known"
    return text


def _finest(drawing: Drawing) -> int:
    """Cells along the longer side of the finest view that is drawn."""
    shapes = [
        row.masks.view(drawing.image, drawing.view).cells.shape
        for row in drawing.rows
        if row.masks is not None and _covers(drawing, row.masks)
    ]
    return max((max(shape) for shape in shapes), default=1)


def _blank_size(drawing: Drawing) -> tuple[int, int]:
    """(width, height) in the proportions of the first view's cells."""
    for row in drawing.rows:
        if row.masks is not None and _covers(drawing, row.masks):
            rows, columns = row.masks.view(drawing.image, drawing.view).cells.shape
            return 28 * columns, 28 * rows
    return 28, 28


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that fit into ``width`` pixels, 8 at most; a word that is longer than a line is broken."""
    room, lines = width - _MARGIN, [""]
    for word in _NOT_IN_XML.sub("\ufffd", text).split():
        for piece in _pieces(word, room):
            joined = f"{lines[-1]} {piece}" if lines[-1] else piece
            if _length(joined) <= room:
                lines[-1] = joined
            else:
                lines.append(piece)
    if len(lines) > _MOST_LINES:
        last = next(_pieces(f"{lines[_MOST_LINES - 1]} ", room - _length(" ..."))).rstrip()
        lines[_MOST_LINES - 1 :] = [f"{last} ..."]
    return lines if lines[0] else []


def _pieces(word: str, room: float) -> Iterator[str]:
    start, length = 0, 0.0
    for end, character in enumerate(word):
        length += _character(character)
        if length > room and end > start:
            yield word[start:end]
            start, length = end, _character(character)
    yield word[start:]


def _length(text: str) -> float:
    return sum(map(_character, text))


@cache
def _character(character: str) -> float:
    """Pixels that it takes at most in common sans-serif fonts, of which Pillow's own is a narrow one."""
    from PIL import ImageFont

    if unicodedata.east_asian_width(character) in "WF":
        return _FONT
    return _WIDER * float(ImageFont.load_default(_FONT).getlength(character))


def _escaped(text: str) -> str:
    return html.escape(_NOT_IN_XML.sub("\ufffd", text))


def _rectangle(cell: Pixels, inset: float = 0) -> str:
    """An outline of width w is drawn w/2 inside, as Pillow does."""
    x0, y0, x1, y1 = cell
    width, height = max(0, x1 - x0 - 2 * inset), max(0, y1 - y0 - 2 * inset)
    return f'<rect x="{x0 + inset:g}" y="{y0 + inset:g}" width="{width:g}" height="{height:g}"/>'
