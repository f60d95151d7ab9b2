"""The plugin in vLLM's CPU engine: a fixed memory, and what 1 GiB holds: reports of bench_vllm."""

from __future__ import annotations

from pathlib import Path

from pictures.bars import draw_bars
from pictures.style import Theme, save, sheet, sources
from tables.report import Reports
from tables.vllm import CACHES, HOLDING

REPORTS = ("vllm", "vllm_memory")


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    timed, held = reports["vllm"], reports["vllm_memory"]
    speeds = [timed.value(f"equal memory, {name}", "throughput") for name in CACHES]
    tokens = [held.value(f"memory, {name}", "tokens") for name in HOLDING]
    gain = speeds[CACHES.index("int2")] / speeds[0]
    title = f"In the same memory, int2 blocks let vLLM decode {gain:.1f} times as much"
    subtitle = (
        "SmolLM2-135M inside vLLM 0.32's CPU engine. Left: 32 requests of 256 + 96 tokens in 160 "
        "MiB, computed in float32. Right: tokens that 1 GiB holds in bfloat16, by vLLM's log at "
        "4096 tokens a request."
    )
    panels = (
        (CACHES, speeds, "{:.0f}", "tokens a second"),
        (HOLDING, tokens, "{:,.0f}", "tokens in 1 GiB"),
    )
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=3.3, panels=(1, 2)) as on:
        for axis, (names, values, form, label) in zip(on.axes, panels, strict=True):
            colors = [theme.series[5 if name.startswith("vLLM") else 0] for name in names]
            draw_bars(axis, names, values, colors, form=form, theme=theme)
            axis.set_xlabel(f"{label} (more is better)")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        on.axes[1].locator_params(axis="x", nbins=5)
        save(on, file, reports, REPORTS)
