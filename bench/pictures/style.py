"""How every picture looks, light and dark: colours, title, labels at their lines, where it is from.

Knows paper and ink, never what is shown. matplotlib is imported where something is drawn, so that
what pictures are made of can be read and tested without it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tables.report import Reports

WIDTH, MARGIN, TITLE, NOTE, INCH = 8.4, 0.16, 13, 8, 72  # inches; points; points of an inch


class Theme(NamedTuple):
    """Colours by what they are for. Series are Okabe and Ito's, lighter on dark paper."""

    name: str
    paper: str
    ink: str
    quiet: str
    grid: str
    series: tuple[str, ...]  # ours first


LIGHT = Theme(
    "light", "#ffffff", "#1f2328", "#59636e", "#dfe3e8",
    ("#0072B2", "#D55E00", "#009E73", "#A3568A", "#8A6D00", "#59636e"),
)  # fmt: skip
DARK = Theme(
    "dark", "#0d1117", "#e6edf3", "#9198a1", "#2a3038",
    ("#56B4E9", "#F08A3C", "#2FC79A", "#DE9AC6", "#E6C229", "#9198a1"),
)  # fmt: skip
THEMES = (LIGHT, DARK)


class Sheet(NamedTuple):
    """A picture before it is drawn on: its axes and its colours."""

    figure: Any
    axes: Sequence[Any]
    theme: Theme

    @property
    def axis(self) -> Any:
        return self.axes[0]


def settings(theme: Theme) -> dict[str, Any]:
    return {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.quiet,
        "axes.labelcolor": theme.quiet,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.ink,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9,
        "text.color": theme.ink,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "svg.fonttype": "path",  # the same wherever it is looked at
        "svg.hashsalt": "paged_kv",
    }


@contextmanager
def sheet(
    theme: Theme,
    title: str,
    subtitle: str,
    source: str,
    *,
    height: float,
    panels: tuple[int, int] = (1, 1),
    **options: Any,
) -> Iterator[Sheet]:
    """Axes between a title and where figures are from; inside `with` it has the theme's colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = textwrap.wrap(subtitle, 116)
    above = (TITLE * 1.9 + NOTE * 1.7 * len(lines)) / INCH
    with matplotlib.rc_context(settings(theme)):
        figure, axes = pyplot.subplots(
            *panels, figsize=(WIDTH, height), layout="constrained", squeeze=False, **options
        )
        below = NOTE * (1.3 + 1.3 * len(source.splitlines())) / INCH
        figure.get_layout_engine().set(
            rect=(0, below / height, 1, 1 - (above + below) / height), w_pad=0.14, h_pad=0.06
        )
        left = MARGIN / WIDTH
        figure.text(left, 1 - 0.12 / height, title, fontsize=TITLE, fontweight="bold", va="top")
        figure.text(
            left, 1 - (TITLE * 1.9 / INCH) / height, "\n".join(lines),
            fontsize=NOTE + 1, color=theme.quiet, va="top", linespacing=1.35,
        )  # fmt: skip
        figure.text(
            left, 0.1 / height, source, fontsize=NOTE - 1, color=theme.quiet, va="bottom",
            linespacing=1.3,
        )  # fmt: skip
        try:
            yield Sheet(figure, list(axes.flat), theme)
        finally:
            pyplot.close(figure)


def save(on: Sheet, file: Path, reports: Reports, names: Sequence[str]) -> None:
    """With what it was drawn from in its metadata."""
    metadata = {"Date": None, "Creator": None, "Description": drawn_from(reports, names)}
    on.figure.savefig(file, metadata=metadata if file.suffix == ".svg" else None, dpi=110)


def sources(reports: Reports, names: Sequence[str]) -> str:
    """In lines that are no longer than a picture is wide."""
    told = (reports[name].source().replace("`", "") for name in names)
    return "\n".join(line for source in told for line in textwrap.wrap(source, 134))


def drawn_from(reports: Reports, names: Sequence[str]) -> str:
    """What tells a picture of these reports from one of others."""
    return " ".join(f"{name}.json:{reports[name].digest}" for name in names)


def label_line(axis: Any, x: float, y: float, text: str, color: str, down: float = 0) -> None:
    """At the end of a line, `down` points below it."""
    axis.annotate(
        text, (x, y), xytext=(7, -down), textcoords="offset points", color=color, va="center",
        fontsize=9, annotation_clip=False,
    )  # fmt: skip


Label = tuple[str, tuple[float, float], str]  # text, place in data, colour
# Where a label may go: points right and up from its point, and how it is aligned.
PLACES = (
    (7, 0, "left", "center"),
    (5, 7, "left", "bottom"),
    (5, -7, "left", "top"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (-7, 0, "right", "center"),
    (-5, 7, "right", "bottom"),
    (-5, -7, "right", "top"),
)


def label_points(
    on: Sheet, axis: Any, labels: Sequence[Label], line: Sequence[tuple[float, float]] = ()
) -> None:
    """Each where it hides least: neither a point, a label that is there already, nor the line."""
    figure = on.figure
    figure.draw_without_rendering()  # so that the axes are where they will be
    renderer = figure.canvas.get_renderer()
    spots = list(axis.transData.transform([place for _, place, _ in labels]))
    corners = axis.transData.transform(line) if line else []
    for begin, end in pairwise(corners):
        spots += [begin + (end - begin) * part / 40 for part in range(41)]
    taken: list[Any] = []
    frame = axis.get_window_extent(renderer)
    for text, place, color in labels:
        tries = []
        for number, (right, up, across, along) in enumerate(PLACES):
            note = axis.annotate(
                text, place, xytext=(right, up), textcoords="offset points", ha=across, va=along,
                color=color, fontsize=8.5,
            )  # fmt: skip
            box = note.get_window_extent(renderer).expanded(1.02, 1.1)
            hidden = sum(box.overlaps(other) for other in taken)
            hidden += any(box.contains(*spot) for spot in spots)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0
            tries.append((hidden + 3 * outside, number, note, box))
        best = min(tries, key=lambda each: each[:2])
        for each in tries:
            if each is not best:
                each[2].remove()
        taken.append(best[3])
