"""Hit rate and requests within the limits, by routing policy: bench_fleet."""

from __future__ import annotations

from pathlib import Path

from pictures.bars import draw_bars
from pictures.style import Theme, save, sheet, sources
from tables.fleet import HIT, KEPT, POLICIES
from tables.report import Reports

REPORTS = ("fleet",)
PANELS = (
    (HIT, "tokens of prompts found in the cache, %"),
    (KEPT, "requests that keep the limits, %"),
)
SHOWN = ("native", "int2")


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    report = reports["fleet"]
    best, turns = (
        report.value(f"policies, {policy}, native", HIT) for policy in ("KV-aware", "round robin")
    )
    title = f"A router that knows the blocks: {best / turns:.1f} times round robin's hits"
    subtitle = (
        "16 L4 cards on paper, Llama-3-8B's shape, 12 conversations a second with Zipf-distributed "
        "prefixes; real scheduler and block manager, simulated time. Limits: 3 s to the first "
        "token, 200 ms between tokens."
    )
    names = [f"{policy}, {name}" for policy in POLICIES for name in SHOWN]
    colors = [theme.series[number] for _ in POLICIES for number in (1, 0)]
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=4.6, panels=(1, 2)) as on:
        for axis, (metric, label) in zip(on.axes, PANELS, strict=True):
            values = [
                report.value(f"policies, {policy}, {name}", metric)
                for policy in POLICIES
                for name in SHOWN
            ]
            draw_bars(axis, names, values, colors, theme=theme, named=axis is on.axis)
            axis.margins(x=0.12)
            axis.set_xlim(0, 112)
            axis.set_xlabel(label)
        save(on, file, reports, REPORTS)
