"""What random requests, kills and faults did not break: `make soak` and `make mutants`."""

from __future__ import annotations

from tables.report import Report, Reports, table

MODELS = ("simulated model", "real model")
MUST_BE_ZERO = (
    "requests lost",
    "leaks",
    "changed outputs of others",
    "exceptions that are not the caller's",
)


def engine(reports: Reports) -> str:
    report = reports["soak"]
    metrics = ("requests", "tokens", "faults", "recovered", *MUST_BE_ZERO)
    lines = [
        (metric, *(f"{report.value(name, metric):,}" for name in MODELS)) for metric in metrics
    ]
    slope = "resident memory slope"
    slopes = (f"{abs(report.value(name, slope)):.2f} MiB" for name in MODELS)
    lines.append(("memory gained in 10,000 requests", *slopes))
    return table(("", *MODELS), lines)


def zero(report: Report, case: str, *metrics: str) -> None:
    """This page says that nothing of the kind happened."""
    for metric in metrics:
        if report.value(case, metric):
            raise ValueError(f"{report.name}.json: {metric} of {case} is not 0, as the page says")


def block_manager(reports: Reports) -> str:
    report = reports["soak_block_manager"]
    zero(report, "soak", "mismatches")
    counted = {
        name: f"{report.value('soak', name):,}" for name in ("steps", "steps with groups of layers")
    }
    kinds = sum(row["case"] == "operations" for row in report.rows)
    return (
        f"{counted['steps']} random steps of {kinds} kinds of operations on the block manager, "
        f"{counted['steps with groups of layers']} of them with several groups of layers, each "
        "compared with a reference manager in plain Python: no mismatch."
    )


def batch_job(reports: Reports) -> str:
    report = reports["soak_job"]
    zero(report, "native", "lost", "twice", "other than undisturbed", "files left over")
    return (
        f"A batch job of {report.value('native', 'requests'):,} requests, killed "
        f"{report.value('native', 'kills')} times and resumed: none lost, none twice, every "
        "result as in an undisturbed run."
    )


def http(reports: Reports) -> str:
    report = reports["soak_http"]
    zero(report, "HTTP", "wrong or lost", "status after SIGTERM")
    running = report.row("HTTP", "clients at once")
    return (
        f"{report.value('HTTP', 'requests'):,} requests over HTTP by {running['value']} clients "
        "at once that ask, stream, read slowly, leave early and send nonsense: none wrong or "
        f"lost, {report.value('HTTP', 'growth of memory, second half'):.1f} MiB of memory gained "
        "in the second half."
    )


def mutants(reports: Reports) -> str:
    report = reports["mutants"]
    caught, survived = (report.value("all", f"faults {end}") for end in ("caught", "survived"))
    return (
        f"Of {caught + survived:.0f} faults of one line that `make mutants` plants, one at a "
        f"time, the tests see {caught}."
    )
