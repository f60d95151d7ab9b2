"""Horizontal bars that say their own values. Knows numbers, never what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pictures.style import Theme


def draw_bars(
    axis: Any,
    names: Sequence[str],
    values: Sequence[float | None],
    colors: Sequence[str],
    *,
    form: str = "{:.0f}",
    theme: Theme,
    named: bool = True,
) -> None:
    """From top to bottom; where there is no value the place stays empty."""
    places = range(len(names))[::-1]
    for place, value, color in zip(places, values, colors, strict=True):
        if value is not None:
            axis.barh(place, value, color=color, height=0.72)
            axis.annotate(
                form.format(value), (value, place), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=8, color=theme.ink,
            )  # fmt: skip
    axis.set_yticks(list(places), list(names) if named else [""] * len(names))
    axis.tick_params(axis="y", length=0, labelcolor=theme.ink)
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.24)
    axis.set_xlim(left=0)
