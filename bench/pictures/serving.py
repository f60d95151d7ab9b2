"""Serving end to end beside transformers: a report of bench_throughput."""

from __future__ import annotations

from pathlib import Path

from pictures.bars import draw_bars
from pictures.style import Theme, save, sheet, sources
from tables.report import Reports
from tables.serving import FORMATS, SPEED

REPORTS = ("throughput",)
PEERS = {
    "transformers continuous batching": "transformers, continuous batching",
    "static batches of 8, sorted": "static batches of 8, sorted by output length",
    "QuantizedCache, quanto 0.2.7, 4-bit": "the same with QuantizedCache, quanto 4 bits",
    "sequential generate": "generate(), one request after the other",
    "static batches of 8": "static batches of 8, in order of arrival",
}


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    report = reports["throughput"]
    speeds = {name: report.value(f"1 thread, {name}", SPEED) for name in (*FORMATS, *PEERS)}
    batching, one = "transformers continuous batching", "sequential generate"
    title = (
        f"{speeds['native'] / speeds[batching]:.1f} times transformers' continuous batching, "
        f"{speeds['native'] / speeds[one]:.1f} times generate()"
    )
    subtitle = (
        "Output tokens a second of 32 requests of mixed length on an 11 M-parameter Llama in "
        "fp32, one thread, greedy. In native every token is generate()'s."
    )
    names = [*(f"paged_kv, {name}" for name in FORMATS), *PEERS.values()]
    colors = [theme.series[0]] * len(FORMATS) + [theme.series[5]] * len(PEERS)
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=3.6) as on:
        draw_bars(on.axis, names, list(speeds.values()), colors, theme=theme)
        on.axis.margins(x=0.08)
        on.axis.set_xlabel("output tokens a second (more is better)")
        save(on, file, reports, REPORTS)
