"""Sinks and windows over a long text, beside dense attention: reports of bench_windowed.

Knows rows of reports, never how they were measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pictures.bounds import DEMO as MODEL
from pictures.bounds import bound
from pictures.style import Theme, label_line, save, sheet, sources
from tables.report import Report, Reports
from tables.streams import DEMO

REPORTS = ("windowed", "windowed_sinks")
DENSE, LOSS, HELD = "dense within 1024", "log-perplexity", "KV memory"
MODELS = {"windowed": "The demo model", "windowed_sinks": "The demo model taught sinks"}
Curve = list[tuple[int, float]]


def curve(report: Report, name: str, metric: str) -> Curve:
    """By the position at which a stretch of the text begins."""
    found = []
    for row in report.rows:
        mine, _, start = row["case"].rpartition(", at ")
        if row["metric"] == metric and mine == name:
            found.append((int(start), float(row["value"])))
    return found


def above_dense(report: Report, name: str) -> Curve:
    """Of the same stretches of the text: dense attention's last one ends earlier."""
    dense = dict(curve(report, DENSE, LOSS)[:-1])
    return [(x, y - dense[x]) for x, y in curve(report, name, LOSS) if x in dense]


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    colors = dict(zip(DEMO, (theme.series[index] for index in (5, 2, 3, 0, 1)), strict=True))
    title = "Loss and memory of a stream stay where they are, 100 windows on"
    subtitle = (
        "110,000 tokens of a novel in windows of 1024. Above: loss of a stretch of 2048 tokens "
        "minus that of dense attention within 1024 tokens on the same text, with full precision; "
        "below 0 is better. Below: keys and values held, and what full precision never passes "
        "(dotted)."
    )
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=6.6, panels=(2, 2), sharex=True) as on:
        for axis, (name, label) in zip(on.axes, MODELS.items(), strict=False):
            axis.set_title(label)
            draw_losses(axis, reports[name], colors, theme)
        on.axes[1].sharey(on.axes[0])
        for axis, name in zip(on.axes[2:], MODELS, strict=True):
            draw_memory(axis, reports[name], colors)
            axis.set_xlabel("position in the text, tokens", loc="left")
        on.axes[0].set_ylabel("loss above dense attention, nat")
        on.axes[2].set_ylabel("K/V held, MiB")
        on.axes[0].set_xlim(0, 175_000)
        on.axes[0].set_xticks(range(0, 110_001, 50_000), ["0", "50,000", "100,000"])
        save(on, file, reports, REPORTS)


def draw_losses(axis: Any, report: Report, colors: dict[str, str], theme: Theme) -> None:
    axis.plot([0, curve(report, DENSE, LOSS)[-1][0]], [0, 0], color=theme.ink, linewidth=0.8)
    ends = {}
    for name, color in colors.items():
        points = above_dense(report, name)
        axis.plot(*zip(*points, strict=True), color=color, linewidth=1.2)
        ends[name] = sum(y for _, y in points[-8:]) / 8, points[-1][0], color
    apart = max(y for y, _, _ in ends.values()) - min(y for y, _, _ in ends.values()) > 0.05
    for name, (y, x, color) in ends.items():
        if apart and name.startswith("window only"):
            label_line(axis, x, y, "window only,\nnative", color)
    y, x, _ = ends["sinks + window, int8"]
    told = "sinks + window:\nall formats" if apart else "all, window only\namong them"
    label_line(axis, x, y, told, theme.ink)


def draw_memory(axis: Any, report: Report, colors: dict[str, str]) -> None:
    for name, color in colors.items():
        points = curve(report, name, HELD)
        if name.startswith("window only"):
            continue  # it lies on native with sinks
        kv_format = name.rpartition(" ")[2]
        held = [y / 1024 for _, y in points]
        axis.plot([x for x, _ in points], held, color=color, linewidth=1.6)
        if kv_format == "native":  # the others' blocks were larger then than a bound of today
            most = bound(MODEL, kv_format) / 2**20
            if max(held) > most:
                raise ValueError(f"{name} held {max(held)} MiB, more than its bound of {most}")
            axis.plot([0, points[-1][0]], [most, most], color=color, linewidth=1.1, linestyle=":")
            label_line(axis, points[-1][0], most, f"bound, {most:.1f}", color)
        label_line(axis, points[-1][0], held[-1], f"{kv_format}, {held[-1]:.1f}", color)
    axis.set_ylim(bottom=0)
