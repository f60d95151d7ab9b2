"""Output tokens a second of every engine, a chart for each workload: a report of bench_peers.

Knows rows of a report, never how they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pictures.bars import draw_bars
from pictures.style import Theme, save, sheet, sources
from tables.peers import ENGINES, WORKLOADS
from tables.report import Reports, Row

REPORTS = ("peers",)
PRECISION = "bfloat16"
METRICS = {"throughput": "tokens a second", "first token": "seconds to the first token"}
SHORT = {"OpenVINO u8": "OpenVINO, u8", "llama.cpp f16": "llama.cpp, f16"}


def values_of(rows: Sequence[Row], metric: str) -> dict[str, dict[str, float]]:
    """Of each workload and engine."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        workload, engine = row["case"].split(", ", 1)
        if row["metric"] == metric and engine.endswith(f" {PRECISION}"):
            found.setdefault(workload, {})[engine.removesuffix(f" {PRECISION}")] = row["value"]
    return found


def num_won(values: dict[str, dict[str, float]]) -> int:
    """Workloads in which one of ours is the fastest."""
    fastest = [max(engines, key=lambda name: engines[name]) for engines in values.values()]
    return sum(name.startswith("ours") for name in fastest)


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    found = {metric: values_of(reports["peers"].rows, metric) for metric in METRICS}
    won = num_won(found["throughput"])
    title = f"Most tokens a second in {won} of {len(WORKLOADS)} workloads on a CPU"
    subtitle = (
        "SmolLM2-135M in bfloat16, all requests at once, greedy, medians of three rounds in "
        "turns. Above: output tokens a second (more is better). Below: seconds to the first token "
        "(less is better)."
    )
    ours, others = theme.series[0], theme.series[5]
    colors = [ours if name.startswith("ours") else others for name in ENGINES]
    names = [SHORT.get(name, name) for name in ENGINES]
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=4.9, panels=(2, len(WORKLOADS))) as on:
        for number, axis in enumerate(on.axes):
            below, column = divmod(number, len(WORKLOADS))
            metric, workload = list(METRICS)[below], list(WORKLOADS)[column]
            values = [found[metric][workload].get(name) for name in ENGINES]
            form = "{:.3g}" if below == 0 else "{:.2g}"
            draw_bars(axis, names, values, colors, form=form, theme=theme, named=column == 0)
            axis.margins(x=0.4)
            axis.locator_params(axis="x", nbins=3)
            if below == 0:
                label = (
                    WORKLOADS[workload]
                    .replace(", prefix caches on", "")
                    .replace("lognormal", "mixed")
                )
                axis.set_title(label, fontsize=8.5)
            if column == 0:
                axis.set_xlabel(METRICS[metric], loc="left")
        save(on, file, reports, REPORTS)
