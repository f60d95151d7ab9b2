"""Our server beside the engine alone and vLLM's server: the report of bench_server."""

from __future__ import annotations

from tables.report import Reports, table

COLUMNS = (
    *("saturated, offline", "saturated, ours", "saturated, vLLM"),
    *("Poisson, ours", "Poisson, vLLM"),
)
METRICS = (
    *("output tokens", "requests"),
    *(f"first token, {share}" for share in ("median", "p90", "p99")),
    *(f"between tokens, {share}" for share in ("median", "p90", "p99")),
    *("between tokens, p99 in medians", "longest request in medians"),
)


def servers(reports: Reports) -> str:
    report = reports["server"]
    units = {row["metric"]: row["unit"] for row in report.rows}
    figures = {(row["case"], row["metric"]): row["value"] for row in report.rows}
    lines = []
    for metric in METRICS:
        unit = "" if units[metric] == "medians" else f", {units[metric]}"
        found = (figures.get((column, metric)) for column in COLUMNS)
        lines.append(
            (f"{metric}{unit}", *("" if value is None else digits(value) for value in found))
        )
    return table(("", *COLUMNS), lines)


def digits(value: float) -> str:
    """Three of them; none are lost of large times."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def told(reports: Reports) -> str:
    report = reports["server"]
    offline = report.ratio("saturated, ours beside offline", "output tokens")
    even = {
        name: report.value(f"Poisson, {name}", "between tokens, p99 in medians")
        for name in ("ours", "vLLM")
    }
    longest = max(
        row["value"] for row in report.rows if row["metric"].startswith("longest request")
    )
    return (
        f"No request took more than {longest:.1f} times as long as the median one. The load tool "
        "shares the two cores, which the engine alone (offline) has to itself: the server does "
        f"{offline:.2f} of that. Prompts are what vLLM computes faster here. Beside arrivals "
        "`--max-slowdown` (3) cuts prompts into pieces, so that tokens come evenly: p99 is "
        f"{even['ours']:.1f} medians, vLLM's {even['vLLM']:.1f}; first tokens wait longer for it."
    )
