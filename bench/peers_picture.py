"""Output tokens a second of every engine, a chart for each workload, from a report of bench_peers.

Knows rows of a report, never how they were measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

METRICS = {"throughput": "output tokens/s", "first token": "seconds to the first token"}
OURS, PEERS = "#1f5fa8", "#b9bec6"


def values_of(rows: list[dict[str, Any]], metric: str) -> dict[str, dict[str, float]]:
    """Of each workload and engine."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == metric:
            workload, engine = row["case"].split(", ", 1)
            found.setdefault(workload, {})[engine] = row["value"]
    return found


def draw(report: dict[str, Any], picture: Path, precision: str = "bfloat16") -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_metric = {metric: values_of(report["rows"], metric) for metric in METRICS}
    workloads = [
        name
        for name, engines in by_metric["throughput"].items()
        if any(engine.endswith(precision) for engine in engines)
    ]
    every = dict.fromkeys(
        engine.removesuffix(f" {precision}")
        for workload in workloads
        for engine in by_metric["throughput"][workload]
        if engine.endswith(precision)
    )
    names = list(every)[::-1]  # a workload may lack some
    figure, axes = pyplot.subplots(
        len(METRICS), len(workloads), figsize=(2.9 * len(workloads), 5.4), layout="constrained"
    )
    for axis_row, (metric, unit) in zip(axes, METRICS.items(), strict=True):
        for axis, workload in zip(axis_row, workloads, strict=True):
            engines = {
                engine.removesuffix(f" {precision}"): value
                for engine, value in by_metric[metric][workload].items()
                if engine.endswith(precision)
            }
            colors = [OURS if name.startswith("ours") else PEERS for name in names]
            bars = axis.barh(names, [engines.get(name, 0.0) for name in names], color=colors)
            labels = [f"{engines[name]:.3g}" if name in engines else "" for name in names]
            axis.bar_label(bars, labels, padding=2, fontsize=7)
            axis.margins(x=0.2)
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
            if workload != workloads[0]:
                axis.set_yticklabels([])
            if metric == "throughput":
                axis.set_title(workload, fontsize=9)
        axis_row[0].set_xlabel(unit, fontsize=8, loc="left")
    figure.suptitle(f"{report['device']}, {precision}", fontsize=9)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
