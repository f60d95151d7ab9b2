"""Requests within the limits over the load, by format: bench_fleet."""

from __future__ import annotations

from pathlib import Path

from pictures.style import Theme, label_line, save, sheet, sources
from tables.fleet import FORMATS, GOOD, KEPT, LOADS
from tables.report import Reports

REPORTS = ("fleet",)
PANELS = ((KEPT, "requests that keep the limits, %"), (GOOD, "goodput, requests a second"))
COLORS = {"native": 1, "int8": 4, "int4": 2, "int2": 0}


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    report = reports["fleet"]
    last = LOADS[-2]
    native, int2 = (report.value(f"load {last}, {name}", GOOD) for name in ("native", "int2"))
    times = f"{int2 / native:.1f} times native's"
    title = f"At {last} conversations a second and card, int2's goodput is {times}"
    subtitle = (
        "8 L4 cards on paper, Llama-3-8B's shape, KV-aware routing; real scheduler and block "
        "manager, simulated time. Limits: 3 s to the first token, 200 ms between tokens."
    )
    source = sources(reports, REPORTS)
    xs = [float(load) for load in LOADS]
    with sheet(theme, title, subtitle, source, height=3.8, panels=(1, 2)) as on:
        for axis, (metric, label) in zip(on.axes, PANELS, strict=True):
            ends = {}
            for name in FORMATS:
                ys = [report.value(f"load {load}, {name}", metric) for load in LOADS]
                color = theme.series[COLORS[name]]
                axis.plot(xs, ys, color=color, marker="o", markersize=4)
                ends[name] = ys[-1]
            axis.set_ylim(bottom=0)
            label_ends(axis, xs[-1], ends, theme)
            axis.set_xlim(0.4, 3.0)
            axis.set_title(label)
            axis.set_xlabel("conversations a second and card")
        save(on, file, reports, REPORTS)


def label_ends(axis: object, x: float, ends: dict[str, float], theme: Theme) -> None:
    """Each at its line's end; those that would hide each other a line apart."""
    top = axis.get_ylim()[1]  # type: ignore[attr-defined]
    apart, place = 0.065 * top, None
    for name in sorted(ends, key=lambda name: -ends[name]):
        y = ends[name] if place is None else min(ends[name], place - apart)
        place = y
        points = (ends[name] - y) / top * 190
        label_line(axis, x, ends[name], name, theme.series[COLORS[name]], points)
