"""Block manager and scheduler beside vLLM's: the report of bench_block_manager."""

from __future__ import annotations

from tables.report import Report, Reports, table, times

COUNTS = (1024, 4096, 16384)
ADMISSION = "admission, in a batch"
MISS, OFF = "prompt of 1024 tokens, prefix cache miss", "prompt of 1024 tokens, prefix cache off"


def several(report: Report, cases: list[str], metric: str) -> tuple[str, str]:
    """Ours in microseconds, and vLLM's in multiples of them."""
    rows = [report.row(case, metric) for case in cases]
    ours = " / ".join(f"{row['value']:.0f}" for row in rows)
    return ours, " / ".join(f"{row['ratio']:.0f}x" for row in rows)


def steps(reports: Reports) -> str:
    report = reports["block_manager"]
    deciding = [f"decode step of {count} sequences" for count in COUNTS]
    running = [f"{count} running requests" for count in COUNTS]
    counts = " / ".join(map(str, COUNTS))
    lines = [
        (
            f"decode step of {counts} sequences, manager",
            *several(report, deciding, "manager, int8"),
        ),
        (f"schedule + update, {counts} running", *several(report, running, "schedule + update")),
        (
            "the same right after 64 MB of other memory were read",
            *several(report, running, "schedule + update, cold caches"),
        ),
    ]
    labels = {
        ADMISSION: "admit a prompt of 1024 tokens, not cached, 64 in a step",
        "free": "free it",
    }
    for metric, label in labels.items():
        lines.append(
            (label, f"{report.value(MISS, metric):.2g}", times(report.ratio(MISS, metric)))
        )
    return table(("", "ours, us", "vLLM takes"), lines)


def behind(reports: Reports) -> str:
    report = reports["block_manager"]
    pool = "pool of 1,000,000 blocks"
    preempted = report.row("1024 running requests", "preempt by recompute, one")
    return (
        f"Behind vLLM: admission without a prefix cache ({report.value(OFF, ADMISSION):.0f} us, "
        f"{report.ratio(OFF, ADMISSION):.2f}x; one alone in its step "
        f"{report.ratio(OFF, 'admission, alone'):.2f}x) and preempting one of 1024 requests "
        f"({preempted['value']:.0f} us, {preempted['ratio']:.2f}x). `int2`'s step of 4096 is "
        f"{report.ratio('decode step of 4096 sequences', 'manager, int2'):.0f}x. A pool of a "
        f"million blocks takes {report.value(pool, 'bytes a block'):.0f} bytes a block and "
        f"{report.value(pool, 'build'):.1f} ms to build."
    )
