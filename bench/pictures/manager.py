"""A step of block manager and scheduler by the number of sequences: bench_block_manager."""

from __future__ import annotations

from pathlib import Path

from pictures.style import Theme, label_line, save, sheet, sources
from tables.report import Reports

REPORTS = ("block_manager",)
COUNTS = (256, 1024, 4096, 16384)
PANELS = {
    "Block manager: a decode step": ("decode step of {} sequences", "manager, int8"),
    "Scheduler and block manager: schedule + update": ("{} running requests", "schedule + update"),
}


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    report = reports["block_manager"]
    found = {
        panel: [report.row(case.format(count), metric) for count in COUNTS]
        for panel, (case, metric) in PANELS.items()
    }
    ratios = [row["ratio"] for row in found[next(iter(PANELS))][1:]]
    title = (
        f"A decode step takes vLLM's manager {min(ratios):.0f} to {max(ratios):.0f} times as long"
    )
    subtitle = (
        "Time of the manager alone, no model, by the number of sequences; both axes logarithmic. "
        "int8's geometry beside vLLM's blocks of 16 tokens, same lengths, prefix cache on, in "
        "turns in one process."
    )
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=3.8, panels=(1, 2), sharey=True) as on:
        for axis, (panel, rows) in zip(on.axes, found.items(), strict=True):
            for name, key, color in (
                ("paged_kv", "value", theme.series[0]),
                (rows[0]["baseline"], "baseline_value", theme.series[1]),
            ):
                times = [row[key] for row in rows]
                axis.plot(COUNTS, times, color=color, marker="o", markersize=4)
                label_line(axis, COUNTS[-1], times[-1], name.replace(" ", "\n", 1), color)
            axis.set_title(panel)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
            axis.set_xlim(200, 60_000)
            axis.set_ylim(20, 1_000_000)
            axis.set_xlabel("sequences")
        on.axis.set_ylabel("microseconds of a step")
        on.axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        save(on, file, reports, REPORTS)
