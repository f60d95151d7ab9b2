"""Divergence over bytes a token, ours and peers: one chart from a report of bench_quality.

Knows rows of a report, never how they were measured.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

BYTES = "bytes of a token and kv head"
DIVERGENCE = "KL from native"
PEERS = ("KIVI", "quanto", "TurboQuant", "llama.cpp", "fp8")


def points(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of each case: sealed bytes of a token and kv head, mean divergence over all windows."""
    sizes = {row["case"]: row["value"] for row in rows if row["metric"] == BYTES}
    found = defaultdict(list)
    for row in rows:
        name = re.sub(r", [^,]*, \d+ x \d+ tokens$", "", row["case"])
        if row["metric"] == DIVERGENCE and name in sizes:
            found[name].append(row["value"])
    return {name: (sizes[name], float(np.mean(values))) for name, values in found.items()}


def frontier(of: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats in both."""
    best: list[tuple[float, float]] = []
    for point in sorted(of):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def draw(report: dict[str, Any], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = points(report["rows"])
    kinds = {
        "paged_kv": [n for n in found if not n.startswith(PEERS)],
        "peers": [n for n in found if n.startswith(PEERS) and "head + tail" not in n],
        "peers with our head and tail": [n for n in found if "head + tail" in n],
    }
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for index, (kind, names) in enumerate(kinds.items()):
        if not names:
            continue
        mine = [found[name] for name in names]
        axis.scatter(*zip(*mine, strict=True), color=f"C{index}", s=28, label=kind)
        axis.plot(*zip(*frontier(mine), strict=True), color=f"C{index}", linewidth=1)
        for name, place in zip(names, mine, strict=True):
            label = name.replace(", head + tail", "")
            axis.annotate(
                label,
                place,
                fontsize=7,
                xytext=(4, 3),
                textcoords="offset points",
                color=f"C{index}",
            )
    axis.set_yscale("log")
    axis.set_xlabel("bytes of a sealed token and kv head")
    axis.set_ylabel("KL from native (mnat), mean over all windows")
    axis.legend(fontsize=8)
    figure.savefig(picture, dpi=90)
