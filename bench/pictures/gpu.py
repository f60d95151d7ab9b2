"""Decode attention on a GPU: share of a copy's bandwidth by format and shape, and time by peers.

`python bench/make_results.py --gpu FOLDER` draws attention-light.svg and attention-dark.svg into
the folder from what bench_gpu_attention's stage of run_gpu.sh left there. Knows rows of a report,
never how they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pictures.style import THEMES, Sheet, Theme, save, sheet, sources
from tables.report import Reports, Row

REPORT, PICTURE = "sweep", "attention"
BANDWIDTH, TIME, OURS = "needed bytes read", "decode us", "ours"

Figures = dict[str, dict[str, float]]  # of each shape, of each format


def split_case(case: str) -> tuple[str, str]:
    """The format, and the shape in two lines."""
    kv_format, shape = case.split(" ", 1)
    return kv_format, shape.replace(", ", "\n").replace(" queries a head", " queries")


def shares_of_copy(rows: Sequence[Row]) -> Figures:
    found: Figures = {}
    for row in rows:
        if row["metric"] == BANDWIDTH:
            kv_format, shape = split_case(row["case"])
            found.setdefault(shape, {})[kv_format] = row["ratio"]
    return found


def microseconds(rows: Sequence[Row]) -> Figures:
    """Ours by format, peers by name; those that could not run are left out."""
    found: Figures = {}
    for row in rows:
        if row["metric"] != TIME:
            continue
        kv_format, shape = split_case(row["case"])
        times = found.setdefault(shape, {})
        times[f"{OURS}, {kv_format}"] = row["value"]
        if row["baseline_value"] is not None and not row["baseline"].startswith("our "):
            times[row["baseline"]] = row["baseline_value"]
    return found


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    rows = reports[REPORT].rows
    shares, times = shares_of_copy(rows), microseconds(rows)
    subtitle = (
        "Above: needed bytes a second as a share of a copy's (the line), by format and shape. "
        "Below: microseconds of a decode call, logarithmic; others hatched."
    )
    title = "Decode attention beside a copy of memory"
    source = sources(reports, (REPORT,))
    with sheet(theme, title, subtitle, source, height=7, panels=(2, 1)) as on:
        draw_groups(on, on.axes[0], shares)
        on.axes[0].axhline(1, color=theme.ink, linewidth=0.9)
        on.axes[0].set_ylabel("share of a copy's bytes a second")
        draw_groups(on, on.axes[1], times)
        on.axes[1].set_yscale("log")
        on.axes[1].set_ylabel("microseconds")
        save(on, file, reports, (REPORT,))


def draw_groups(on: Sheet, axis: Any, figures: Figures) -> None:
    """A group of bars for each shape; all groups have the same places."""
    names = list(dict.fromkeys(name for found in figures.values() for name in found))
    names.sort(key=lambda name: not name.startswith(OURS))  # peers behind, else as they came
    size = 0.85 / max(len(names), 1)
    colors = on.theme.series
    for number, name in enumerate(names):
        places = [i + number * size for i, found in enumerate(figures.values()) if name in found]
        values = [found[name] for found in figures.values() if name in found]
        is_peer = name.startswith(("paged", "contiguous"))
        axis.bar(
            places, values, size, label=name, color=colors[number % len(colors)],
            hatch="//" if is_peer else None, edgecolor=on.theme.paper, linewidth=0.4,
        )  # fmt: skip
    axis.set_xticks([i + size * (len(names) - 1) / 2 for i in range(len(figures))], list(figures))
    axis.tick_params(labelsize=7)
    axis.grid(visible=False, axis="x")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def draw_folder(folder: Path) -> None:
    if not (folder / f"{REPORT}.json").exists():
        print(f"no picture: there is no {REPORT}.json in {folder}")
        return
    for theme in THEMES:
        file = folder / f"{PICTURE}-{theme.name}.svg"
        draw(theme, Reports(folder), file)
        print(f"drawn: {file}")
