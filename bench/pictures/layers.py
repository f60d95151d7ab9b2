"""What a sequence holds where most layers have windows, by its length: bench_layer_groups."""

from __future__ import annotations

from pathlib import Path

from pictures.style import Theme, label_line, save, sheet, sources
from tables.layers import FORMATS, LENGTHS, group_memory, share
from tables.report import Reports

REPORTS = ("layer_groups",)


def draw(theme: Theme, reports: Reports, file: Path) -> None:
    report = reports["layer_groups"]
    whole, held = group_memory(report)
    last = list(LENGTHS)[-1]
    part = share(report, "Gemma-3-1b", last)
    title = f"Layers that see 1024 tokens keep 1024: {part:.2f} of the memory at 128K"
    subtitle = (
        "Keys and values of one sequence of a Gemma-3-1b-shaped model in bfloat16, of whose 26 "
        "layers 22 have a window of 1024 tokens; both axes logarithmic."
    )
    lines = {
        "one group that keeps all, native": (whole, theme.series[5]),
        **{
            f"groups, {name}": (held[name], theme.series[number])
            for number, name in zip((1, 2, 0), FORMATS, strict=True)
        },
    }
    source = sources(reports, REPORTS)
    with sheet(theme, title, subtitle, source, height=3.8) as on:
        for name, (sizes, color) in lines.items():
            on.axis.plot(list(LENGTHS), sizes, color=color, marker="o", markersize=4)
            label_line(on.axis, last, sizes[-1], name, color)
        on.axis.set_xscale("log", base=2)
        on.axis.set_yscale("log")
        on.axis.set_xticks(list(LENGTHS), [f"{length:,}" for length in LENGTHS])
        on.axis.set_xlim(900, 900_000)
        on.axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        on.axis.set_xlabel("tokens of the sequence", loc="left")
        on.axis.set_ylabel("MiB of keys and values")
        save(on, file, reports, REPORTS)
