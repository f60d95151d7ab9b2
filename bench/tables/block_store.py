"""A known prompt after a restart: the report of bench_block_store."""

from __future__ import annotations

from tables.report import Report, Reports, brief, table

FORMATS = ("native", "int8", "int8/0", "int4", "int2")
FIRST = "time to the first token"


def line(report: Report, name: str) -> tuple[str, ...]:
    case = f"{name}, 4000 tokens"
    first = report.row(case, FIRST)
    return (
        f"`{name}`",
        brief(first["baseline_value"]),
        brief(first["value"]),
        f"{first['value'] / first['baseline_value']:.2f}",
        f"{report.value(name, 'entries'):,.0f}",
        "" if name == FORMATS[0] else f"{report.ratio(name, 'entries'):.2f}x",
    )


def restarts(reports: Reports) -> str:
    report = reports["block_store"]
    head = ("format", "computed, s", "found, s", "of that", "bytes a token", "smaller")
    return table(head, [line(report, name) for name in FORMATS])


def damaged(reports: Reports) -> str:
    report = reports["block_store"]
    counts = {
        metric: sum(row["value"] for row in report.rows if row["metric"] == metric)
        for metric in ("refused", "answers", "wrong answers")
    }
    entries = sum(
        int(row["case"].split(", ")[1].split()[0])
        for row in report.rows
        if row["metric"] == "answers"
    )
    return (
        f"{entries:,} entries were cut, lengthened, zeroed, emptied or changed by one bit: "
        f"{counts['refused']:,.0f} were refused, and of {counts['answers']:.0f} answers "
        f"{counts['wrong answers']:.0f} differed from those where these entries were removed "
        "instead."
    )
