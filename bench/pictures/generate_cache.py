"""Caches of `generate()`: memory and tokens a second: a report of bench_generate_cache."""

from __future__ import annotations

from pathlib import Path

from pictures.bars import draw_bars
from pictures.style import Theme, save, sheet, sources
from tables.generate_cache import CACHES, HELD, REFERENCE, SPEED
from tables.report import Reports

REPORTS = ("generate_cache",)
BATCH = "batch 32, 512 + 128 tokens"
OURS = "PagedCache "


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    report = reports["generate_cache"]
    held, speeds = (
        {name: report.value(f"{BATCH}, {name}", metric) for name in CACHES}
        for metric in (HELD, SPEED)
    )
    best = f"{OURS}int2, fused"
    speed, smaller = speeds[best] / speeds[REFERENCE], held[REFERENCE] / held[best]
    title = f"generate() from int2 blocks: {speed:.1f} times as fast, {smaller:.1f} times smaller"
    subtitle = (
        "SmolLM2-135M in float32, a batch of 32 prompts of 512 tokens and 128 more, all caches in "
        "turns. PagedCache reads its blocks where they lie (fused), or works with any attention "
        "of transformers (gather)."
    )
    colors = [theme.series[0 if name.startswith(OURS) else 5] for name in CACHES]
    panels = (
        (held, "{:.1f}", "MiB of a sequence, mean (less is better)"),
        (speeds, "{:.0f}", "decoded tokens a second (more is better)"),
    )
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=4.0, panels=(1, 2)) as on:
        for number, (axis, (found, form, label)) in enumerate(zip(on.axes, panels, strict=True)):
            values = list(found.values())
            draw_bars(axis, CACHES, values, colors, form=form, theme=theme, named=not number)
            axis.margins(x=0.12)
            axis.set_xlabel(label)
        save(on, file, reports, REPORTS)
