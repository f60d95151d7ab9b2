"""A stream through a real model, beside full precision with sinks: a report of bench_windowed_real.

Knows rows of a report, never how they were measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pictures.bounds import SMOLLM2, bound
from pictures.streams import LOSS, Curve, curve
from pictures.style import Theme, label_line, save, sheet, sources
from tables.report import Report, Reports
from tables.streams import REAL, WITH_SINKS

REPORTS = ("windowed_real",)
HELD, WINDOW_ONLY = "K/V held, most", "window only, native"


def above_reference(report: Report, name: str) -> Curve:
    reference = dict(curve(report, WITH_SINKS, LOSS))
    return [(x, y - reference[x]) for x, y in curve(report, name, LOSS)]


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    report = reports["windowed_real"]
    colors = dict(zip(REAL, (theme.series[index] for index in (5, 2, 0, 1)), strict=True))
    found = {name: above_reference(report, name) for name in REAL}
    means = {name: sum(y for _, y in points) / len(points) for name, points in found.items()}
    title = (
        f"Without sinks a real model loses {means[WINDOW_ONLY]:.1f} nat; int2 costs "
        f"{means['sinks + window, int2']:.2f}"
    )
    subtitle = (
        "SmolLM2-135M-Instruct reads 40,000 tokens of two novels, 32 sinks and a window of 992. "
        "Loss of a stretch of 2000 tokens minus that of full precision with sinks; right of it "
        "the formats enlarged. Last: keys and values held, and the bound that they never pass "
        "(dotted)."
    )
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=4.3, panels=(1, 3)) as on:
        for axis, names in zip(on.axes, (list(REAL), list(REAL)[1:3]), strict=False):
            for name in names:
                points = found[name]
                axis.plot(*zip(*points, strict=True), color=colors[name], linewidth=1.4)
            axis.axhline(0, color=theme.ink, linewidth=0.8, zorder=0)
        label(on.axes[0], found[WINDOW_ONLY], "window only", colors[WINDOW_ONLY], 2, down=17)
        label(on.axes[0], found[WITH_SINKS], "sinks: all formats", theme.ink, 1, down=-9)
        for name in ("int8", "int2"):
            case = f"sinks + window, {name}"
            label(on.axes[1], found[case], name, colors[case], 1, down=-9)
        draw_memory(on.axes[2], report, colors)
        for axis, name in zip(
            on.axes, ("Loss, nat", "Loss, nat, enlarged", "K/V held, MiB"), strict=True
        ):
            axis.set_title(name)
            axis.set_xlabel("tokens", loc="left")
            axis.set_xticks((0, 20_000, 38_000), ("0", "20,000", "40,000"))
        save(on, file, reports, REPORTS)


def label(axis: Any, points: Curve, text: str, color: str, place: int, down: float = 9) -> None:
    x, y = points[place]
    axis.annotate(
        text, (x, y), xytext=(0, -down), textcoords="offset points", color=color, va="center",
        fontsize=9,
    )  # fmt: skip


def draw_memory(axis: Any, report: Report, colors: dict[str, str]) -> None:
    for name, color in colors.items():
        if name == WINDOW_ONLY:
            continue  # it holds what native with sinks holds
        points, kv_format = curve(report, name, HELD), name.rpartition(" ")[2]
        most, held = bound(SMOLLM2, kv_format) / 2**20, [y for _, y in points]
        if max(held) > most:
            raise ValueError(f"{name} held {max(held)} MiB, more than its bound of {most}")
        axis.plot([x for x, _ in points], held, color=color, linewidth=1.6)
        axis.plot([0, points[-1][0]], [most, most], color=color, linewidth=1.1, linestyle=":")
        label_line(axis, points[-1][0], held[-1], f"{kv_format},\n{held[-1]:.1f}", color)
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, 58_000)
