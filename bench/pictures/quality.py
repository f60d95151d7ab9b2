"""Divergence over bytes a token on a real model, ours and peers: a report of bench_quality.

Knows rows of a report, never how they were measured.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pictures.style import Theme, label_points, save, sheet, sources
from tables.report import Reports, Row

REPORTS = ("quality_real",)
BYTES = "the same, of 2048 tokens with head and tail"
DIVERGENCE = "KL from native"
WINDOWS = re.compile(r", [^,]*, \d+ x 2048 tokens$")
PEERS = ("KIVI", "quanto", "TurboQuant", "llama.cpp", "fp8")
NOT_DRAWN = ("head + tail", "an eighth wide", "in float16", "kivi2")  # told in the text
Point = tuple[float, float]


def points(rows: Sequence[Row]) -> dict[str, Point]:
    """Of each case: bytes of a token and kv head, mean divergence over windows of 2048 tokens."""
    sizes = {row["case"]: row["value"] for row in rows if row["metric"] == BYTES}
    found = defaultdict(list)
    for row in rows:
        name = WINDOWS.sub("", row["case"])
        if row["metric"] == DIVERGENCE and name != row["case"] and name in sizes:
            found[name].append(row["value"])
    return {name: (sizes[name], float(np.mean(values))) for name, values in found.items()}


def frontier(of: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in both."""
    best: list[Point] = []
    for point in sorted(of):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def are_above(peers: Sequence[Point], line: Sequence[Point]) -> bool:
    """Whether all that lie over the line's bytes diverge more than it; what the title says."""
    sizes, values = np.array(line).T
    return all(
        value > np.exp(np.interp(size, sizes, np.log(values)))
        for size, value in peers
        if sizes[0] <= size <= sizes[-1]
    )


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    found = points(reports["quality_real"].rows)
    shown = {name: place for name, place in found.items() if not any(w in name for w in NOT_DRAWN)}
    ours = {name: place for name, place in shown.items() if not name.startswith(PEERS)}
    peers = {name: place for name, place in shown.items() if name.startswith(PEERS)}
    line = frontier(list(ours.values()))
    if not are_above(list(peers.values()), line):
        raise ValueError("a peer is on our side of the line: the title is not true any more")
    subtitle = (
        "SmolLM2-135M-Instruct reads 2048 tokens of each of two novels. Divergence of its "
        "next-token predictions from those with full precision, over what keys and values of a "
        "token take, what stays in full precision (head and tail) included; others as they are, "
        "without a head of ours. bfloat16 takes 256 bytes."
    )
    title = "For their bytes, our formats stay nearest to full precision"
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=5.6) as on:
        axis, labels = on.axis, []
        for places, color, marker in ((ours, theme.series[0], "o"), (peers, theme.series[1], "s")):
            axis.scatter(*zip(*places.values(), strict=True), color=color, s=34, marker=marker)
            labels += [(name, place, color) for name, place in places.items()]
        axis.plot(*zip(*line, strict=True), color=theme.series[0], linewidth=1.4, zorder=1)
        axis.set_yscale("log")
        axis.set_xlim(28, 150)
        axis.set_xlabel("bytes of a token and kv head of 64 channels")
        axis.set_ylabel("KL divergence, mnat (log scale; lower is better)")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        label_points(on, axis, labels, line)
        for text, place, color in (
            ("paged_kv", (86, 0.2), theme.series[0]),
            ("others", (86, 14), theme.series[1]),
        ):
            axis.annotate(text, place, color=color, fontsize=12, fontweight="bold", va="top")
        save(on, file, reports, REPORTS)
