"""The fewest machines that reach the goal, by format: bench_fleet."""

from __future__ import annotations

from pathlib import Path

from pictures.bars import draw_bars
from pictures.style import Theme, save, sheet, sources
from tables.fleet import CARDS, FORMATS, READ_AS_NATIVE
from tables.report import Reports

REPORTS = ("fleet",)
NAMES = (*FORMATS, READ_AS_NATIVE)
LOADS = {"L4": "12 conversations a second", "H100": "64 conversations a second"}
COLORS = (1, 4, 2, 0, 5)


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    report = reports["fleet"]
    ratio = report.value("machines, L4, int2", "native's machines")
    title = f"Where memory is short, native takes {ratio:.1f} times int2's machines"
    subtitle = (
        "Cards on paper with which 95 % of requests keep the limits, Llama-3-8B's shape, KV-aware "
        "routing; means over seeds, lines from the fewest to the most. `Read as native`: int2's "
        "memory, native's time to read."
    )
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=3.4, panels=(1, 2)) as on:
        for axis, card in zip(on.axes, CARDS, strict=True):
            cases = [f"machines, {card}, {name}" for name in NAMES]
            values = [report.value(case, "machines") for case in cases]
            colors = [theme.series[number] for number in COLORS]
            is_first = axis is on.axis
            draw_bars(axis, NAMES, values, colors, form="{:.1f}", theme=theme, named=is_first)
            for place, case in zip(range(len(NAMES))[::-1], cases, strict=True):
                ends = [report.value(case, f"{which} machines") for which in ("fewest", "most")]
                axis.plot(ends, [place + 0.28] * 2, color=theme.ink, linewidth=1.4)
            axis.set_title(f"{card}, {LOADS[card]}")
            axis.set_xlabel("cards")
        save(on, file, reports, REPORTS)
