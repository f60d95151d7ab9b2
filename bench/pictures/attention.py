"""Decode attention on a CPU beside torch's SDPA: a report of bench_attention."""

from __future__ import annotations

from pathlib import Path

from pictures.bars import draw_bars
from pictures.style import Theme, save, sheet, sources
from tables.attention import FORMATS, SHAPES, beside_sdpa
from tables.report import Reports

REPORTS = ("attention_cpu",)
LABELS = {
    "16x2048 8/2 64": "16 x 2048 tokens,\n8/2 heads of 64",
    "64x512 8/8 64": "64 x 512 tokens,\n8/8 heads of 64",
    "4x8192 32/8 128": "4 x 8192 tokens,\n32/8 heads of 128",
    "32 ragged 16-4096 8/2 64": "32 of 16 to 4096 tokens,\n8/2 heads of 64",
}


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    report = reports["attention_cpu"]
    ratios = {shape: [beside_sdpa(report, shape, name) for name in FORMATS] for shape in SHAPES}
    int8 = [found[list(FORMATS).index("int8")] for found in ratios.values()]
    title = (
        f"Decoding from int8 blocks is {min(int8):.0f} to {max(int8):.0f} times as fast as "
        "torch's SDPA"
    )
    subtitle = (
        "How many times as fast attention over scattered blocks is as the fastest variant of SDPA "
        "on contiguous fp32 keys and values, in turns in one process, cold memory. 1 is SDPA."
    )
    colors = [theme.series[0] if name.startswith("int") else theme.series[5] for name in FORMATS]
    names = [name.replace("native", "native,") for name in FORMATS]
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=3.1, panels=(1, len(SHAPES))) as on:
        for axis, shape in zip(on.axes, SHAPES, strict=True):
            is_first = axis is on.axes[0]
            draw_bars(
                axis, names, ratios[shape], colors, form="{:.1f}", theme=theme, named=is_first
            )
            axis.axvline(1, color=theme.series[1], linewidth=1.2)
            axis.set_title(LABELS[shape], fontsize=8.5)
            axis.set_xlabel("times SDPA")
        save(on, file, reports, REPORTS)
