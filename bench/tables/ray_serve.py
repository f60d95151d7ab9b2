"""Our own engine on Ray Serve: the report of bench_ray_serve."""

from __future__ import annotations

from tables.report import Report, Reports, table


def told(reports: Reports) -> str:
    report = reports["ray_serve"]
    case = next(row["case"] for row in report.rows if row["metric"] == "lost")
    lost, wrong, continued = (
        report.value(case, metric) for metric in ("lost", "wrong", "continued elsewhere")
    )
    return (
        f"Measured over HTTP on one machine with the demo model, {case} in their midst: "
        f"{lost:.0f} were lost, {wrong:.0f} had other tokens than one `LLM` alone gives, "
        f"{continued:.0f} went on elsewhere.\n\n{rates(report)}"
    )


def rates(report: Report) -> str:
    """Hit rates by policy: the share of prompt tokens that was found cached."""
    lines = [
        (
            row["case"],
            f"{row['value']:.2f}",
            f"{row['baseline_value']:.2f}",
            f"{row['ratio']:.2f} x",
        )
        for row in report.rows
        if row["metric"] == "hit rate by prefix"
    ]
    return table(("hit rate", "`prefix`", "`round_robin`", ""), lines)
