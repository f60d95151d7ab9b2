"""Pictures of a report: a panel for each metric, a bar for each case, its value beside it.

Knows rows, never how they were measured. Colours are those of Okabe and Ito, which people tell
apart who see no red or green; on a white ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import MissingDependencyError, PagedKVError

COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
MAX_PANELS: Final = 8
PANEL_INCHES: Final = 0.34  # of height for each bar


def require_plot() -> None:
    """Raise `MissingDependencyError` where no picture can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "--plot needs matplotlib: pip install 'paged-kv[plot]'"
        ) from error


def draw(
    report: dict[str, Any], picture: Path, metrics: Sequence[str], bound: str | None = None
) -> None:
    """Panels of the metrics that there are rows of; metrics are named by how they begin.

    Where there are rows of the metric `bound`, a line across each bar shows it.
    """
    require_plot()
    from matplotlib.figure import Figure

    panels = panels_of(report["rows"], metrics)
    if not panels:
        raise PagedKVError(f"nothing to draw in a report of {report['benchmark']}")
    bounds = {row["case"]: row["value"] for row in report["rows"] if row["metric"] == bound}
    heights = [len(bars) + 1.5 for bars in panels.values()]
    figure = Figure(figsize=(8, 1 + PANEL_INCHES * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axis, (title, bars) in zip(axes[:, 0], panels.items(), strict=True):
        draw_bars(axis, f"{title}, | {bound}" if bounds else title, bars)
        for place, case in enumerate(bars):
            if case in bounds:
                axis.plot(bounds[case], place, "k|", markersize=16)
    figure.suptitle(f"paged-kv bench {report['benchmark']}\n{report['device']}", fontsize=10)
    figure.supxlabel(f"{report['command']}  ({report['commit']})", fontsize=6, wrap=True)
    try:
        figure.savefig(picture, dpi=120, facecolor="white")
    except (OSError, ValueError) as error:  # of an ending that is no kind of picture
        raise PagedKVError(f"cannot write {str(picture)!r}: {error}") from error


def panels_of(
    rows: Sequence[dict[str, Any]], metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Values by case, of each metric with its unit, in the order of `metrics`."""
    found: dict[str, dict[str, float]] = {}
    for beginning in metrics:
        for row in rows:
            title = f"{row['metric']} ({row['unit']})" if row["unit"] else row["metric"]
            if title.startswith(beginning):
                found.setdefault(title, {})[row["case"]] = row["value"]
    return dict(list(found.items())[:MAX_PANELS])


def draw_bars(axis: Any, title: str, bars: dict[str, float]) -> None:
    """The first on top; what stands behind the last comma of a case has a colour of its own."""
    kinds = list(dict.fromkeys(case.rpartition(", ")[2] for case in bars))
    colours = [COLOURS[kinds.index(case.rpartition(", ")[2]) % len(COLOURS)] for case in bars]
    axis.barh(list(bars), list(bars.values()), color=colours, height=0.7)
    axis.invert_yaxis()
    for place, value in enumerate(bars.values()):
        axis.annotate(
            f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}",
            (value, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.set_title(title, loc="left", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
