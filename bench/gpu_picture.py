"""Decode attention on a GPU: share of a copy's bandwidth by format and shape, and time by peers.

    python bench/gpu_picture.py FOLDER

Draws attention.png into the folder from what bench_gpu_attention's stage of run_gpu.sh left there.
Knows rows of a report, never how they were measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

REPORT, PICTURE = "sweep.json", "attention.png"
BANDWIDTH, TIME, OURS = "needed bytes read", "decode us", "ours"
COLORS = ("#1f5fa8", "#4f9bd9", "#8fc6e8", "#c9dfef", "#777777", "#aaaaaa")

Figures = dict[str, dict[str, float]]  # of each shape, of each format


def split_case(case: str) -> tuple[str, str]:
    """The format, and the shape in two lines."""
    kv_format, shape = case.split(" ", 1)
    return kv_format, shape.replace(", ", "\n").replace(" queries a head", " queries")


def shares_of_copy(rows: list[dict[str, Any]]) -> Figures:
    found: Figures = {}
    for row in rows:
        if row["metric"] == BANDWIDTH:
            kv_format, shape = split_case(row["case"])
            found.setdefault(shape, {})[kv_format] = row["ratio"]
    return found


def microseconds(rows: list[dict[str, Any]]) -> Figures:
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


def draw(report: dict[str, Any], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares, times = shares_of_copy(report["rows"]), microseconds(report["rows"])
    width = max(7.0, 1.5 * len(shares))
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(width, 8), layout="constrained")
    draw_groups(above, shares)
    above.axhline(1, color="#cc3333", linewidth=0.8)
    above.set_ylabel("needed bytes a second\nover those of a copy")
    draw_groups(below, times)
    below.set_yscale("log")
    below.set_ylabel("microseconds of a decode call")
    figure.suptitle(f"{report['device']}, {report['commit']}", fontsize=9)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def draw_groups(axis: Any, figures: Figures) -> None:
    """A group of bars for each shape; all groups have the same places."""
    names = list(dict.fromkeys(name for found in figures.values() for name in found))
    names.sort(key=lambda name: not name.startswith(OURS))  # peers behind, else as they came
    size = 0.85 / max(len(names), 1)
    for number, name in enumerate(names):
        places = [i + number * size for i, found in enumerate(figures.values()) if name in found]
        values = [found[name] for found in figures.values() if name in found]
        is_peer = name.startswith(("paged", "contiguous"))
        axis.bar(
            places, values, size, label=name, color=None if is_peer else COLORS[number % 6],
            hatch="//" if is_peer else None,
        )  # fmt: skip
    axis.set_xticks([i + size * (len(names) - 1) / 2 for i in range(len(figures))], list(figures))
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where run_gpu.sh left its results")
    folder = parser.parse_args().folder
    if not (folder / REPORT).exists():
        print(f"no picture: there is no {REPORT} in {folder}")
        return
    draw(json.loads((folder / REPORT).read_text()), folder / PICTURE)
    print(f"drawn: {folder / PICTURE}")


if __name__ == "__main__":
    main()
