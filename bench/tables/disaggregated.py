"""A prompt computed in one process and gone on with in another: the report of
bench_disaggregated."""

from __future__ import annotations

from tables.report import Report, Reports, table

FORMATS = ("native", "int8", "int4", "int2")
LENGTHS = (500, 2000, 4000)


def cell(report: Report, name: str, length: int) -> str:
    case = f"{name}, {length} tokens"
    behind = 1000 * report.value(case, "behind the prefill")
    return f"{report.value(case, 'moved'):,.0f} ({behind:.0f})"


def moved(reports: Reports) -> str:
    report = reports["disaggregated"]
    lines = [(f"`{name}`", *(cell(report, name, length) for length in LENGTHS)) for name in FORMATS]
    head = ("bytes a token (ms behind the prefill)", *(f"{n} tokens" for n in LENGTHS))
    return table(head, lines)
