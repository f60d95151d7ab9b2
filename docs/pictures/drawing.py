"""Shapes that the drawings of the docs are made of, as SVG text. Knows no subject.

A picture is a light card with dark text, so that it reads on a light page and on a dark one. What a
colour says is said by a word or a shape too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH = 600
SMALL, NORMAL, LARGE = 15, 17, 19  # of letters
CHARACTER = 0.56  # of its letters' size, the width of a character on the average
FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
CARD, FRAME, TEXT, DIM = "#fcfbf8", "#cfcabd", "#1d1d1b", "#595650"


class Paint(NamedTuple):
    """What fills a shape, and its outline; colours that the colour-blind tell apart."""

    fill: str
    line: str
    dashes: str = ""


OPEN = Paint("#cfe4f3", "#00619c")
SEALED = Paint("#fbdca6", "#9a5b00")
CACHED = Paint("#cdeadf", "#00715a")
FREE = Paint("#ffffff", "#8c877c", "5 4")
PLAIN = Paint("#f0eee7", "#77736a")
CHANGED = Paint("none", "#c24a00")


class Block(NamedTuple):
    """A block of a pool: its id, the tokens in it, and how they lie there."""

    block_id: int
    tokens: Sequence[int]
    is_sealed: bool = False
    is_new: bool = False


class Picture:
    """Shapes on a card of `WIDTH` times `height`. What it shows, in words, stands in its page."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.texts: list[tuple[float, float, str]] = []  # from, to, and what
        self._parts: list[str] = []

    def svg(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
                f'font-family="{FONT}" fill="{TEXT}">',
                f'<rect x="1" y="1" width="{WIDTH - 2}" height="{self.height - 2}" rx="10" '
                f'fill="{CARD}" stroke="{FRAME}"/>',
                *self._parts,
                "</svg>\n",
            ]
        )

    # -- shapes -------------------------------------------------------------------------------

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        paint: Paint = PLAIN,
        line: float = 1.5,
    ) -> None:
        dashes = f' stroke-dasharray="{paint.dashes}"' if paint.dashes else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
            f'fill="{paint.fill}" stroke="{paint.line}" stroke-width="{line:g}"{dashes}/>'
        )

    def line(
        self, points: Sequence[tuple[float, float]], colour: str = TEXT, dashes: str = ""
    ) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>'
        )

    def arrow(self, points: Sequence[tuple[float, float]], colour: str = TEXT) -> None:
        """A line whose last piece, which is level or upright, ends in a point."""
        self.line(points, colour)
        (x0, y0), (x1, y1) = points[-2:]
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        left, right = (
            (x1 - 9 * dx - 5 * dy, y1 - 9 * dy + 5 * dx),
            (
                x1 - 9 * dx + 5 * dy,
                y1 - 9 * dy - 5 * dx,
            ),
        )
        path = " ".join(f"{x:g},{y:g}" for x, y in ((x1, y1), left, right))
        self._parts.append(f'<polygon points="{path}" fill="{colour}"/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = NORMAL,
        *,
        anchor: str = "start",
        bold: bool = False,
        colour: str = TEXT,
    ) -> None:
        """A line of text whose letters stand on `y`."""
        width = len(text) * size * CHARACTER * (1.06 if bold else 1)
        start = x - width * {"start": 0, "middle": 0.5, "end": 1}[anchor]
        self.texts.append((start, start + width, text))
        weight = ' font-weight="bold"' if bold else ""
        colour = f' fill="{colour}"' if colour != TEXT else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight}{colour}>'
            f"{escape(text)}</text>"
        )

    def note(self, x: float, y: float, *lines: str, anchor: str = "start") -> None:
        for index, line in enumerate(lines):
            self.text(x, y + 20 * index, line, SMALL, anchor=anchor, colour=DIM)

    def cell(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str,
        paint: Paint = PLAIN,
        size: int = NORMAL,
    ) -> None:
        """A box with a word in its middle."""
        assert len(text) * size * CHARACTER <= width, text
        self.box(x, y, width, height, paint)
        self.text(x + width / 2, y + height / 2 + size * 0.36, text, size, anchor="middle")

    # -- blocks -------------------------------------------------------------------------------

    def block(self, x: float, y: float, block: Block, size: int = 2, width: float = 76) -> None:
        """Of `size` tokens where it is open, of four times as many where it is sealed."""
        paint, height = SEALED if block.is_sealed else OPEN, 56
        self.box(x, y, width, height, paint)
        self.text(x + 6, y + 17, f"block {block.block_id}", SMALL)
        self.line([(x, y + 23), (x + width, y + 23)], paint.line)
        num_cells = 4 * size if block.is_sealed else size
        for index in range(1, num_cells):
            place = x + width * index / num_cells
            top = y + (46 if block.is_sealed else 23)
            self.line([(place, top), (place, y + height)], paint.line)
        if block.is_sealed:
            run = f"{block.tokens[0]}-{block.tokens[-1]}"
            self.text(x + width / 2, y + 41, run, NORMAL, anchor="middle")
        else:
            for index, token in enumerate(block.tokens):
                place = x + width * (index + 0.5) / size
                self.text(place, y + 46, str(token), NORMAL, anchor="middle")
        if block.is_new:
            self.box(x - 3, y - 3, width + 6, height + 6, CHANGED, 2.5)

    def row(self, x: float, y: float, blocks: Sequence[Block], step: float = 82) -> None:
        for index, block in enumerate(blocks):
            self.block(x + step * index, y, block)
