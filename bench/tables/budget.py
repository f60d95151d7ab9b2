"""What a fixed budget of memory buys: reports of `paged-kv bench throughput`."""

from __future__ import annotations

from tables.report import Report, Reports, table

FORMATS = ("native", "int8", "int2")
BY_TOKEN = "int8-token@64/0"  # in a run of its own, beside native
CASE = "lognormal"


def line(report: Report, name: str) -> tuple[str, ...]:
    case = f"{CASE}, {name}"
    at_once = "sequences at once, while others wait"
    cells = [f"`{name}`"]
    for metric, form in ((at_once, "{:.1f}"), ("output tokens", "{:.0f}")):
        value = form.format(report.value(case, metric))
        cells.append(
            value if name == FORMATS[0] else f"{value} ({report.ratio(case, metric):.2f}x)"
        )
    cells.append(f"{report.value(case, 'preemptions'):.0f}")
    cells.append(f"{report.value(case, 'time to first token, p50') / 1000:.0f}")
    cells.append(f"{report.value(case, 'between tokens, p50'):.0f}")
    return tuple(cells)


def served(reports: Reports) -> str:
    report = reports["budget"]
    head = (
        *("format", "sequences at once, while others wait", "output tokens/s", "preemptions"),
        *("first token, s", "between tokens, ms"),
    )
    lines = [line(report, name) for name in FORMATS]
    lines.insert(2, line(reports["budget_by_token"], BY_TOKEN))
    return table(head, lines)
