"""Tries of several next tokens, found in the text itself: the report of bench_speculation."""

from __future__ import annotations

from tables.report import Reports, table

FORMATS, COUNTS = ("native", "int8"), (1, 4, 8)
PASSAGES = {"repeating": "begins again, greedy", "going on": "goes on, drawn at temperature 1"}


def prompt_lookup(reports: Reports) -> str:
    report = reports["speculation"]
    lines = []
    for passage, label in PASSAGES.items():
        for name in FORMATS:
            cases = [f"{name}, {passage}, {count} sequences" for count in COUNTS]
            same = sum(report.value(case, "runs with the same tokens") for case in cases)
            runs = sum(
                report.row(case, "runs with the same tokens")["baseline_value"] for case in cases
            )
            gains = (f"{report.ratio(case, 'decoded'):.2f}" for case in cases)
            lines.append((f"{label}, `{name}`", *gains, f"{same:.0f} of {runs:.0f}"))
    sequences = (f"{count} sequence{'s' * (count > 1)}" for count in COUNTS)
    return table(("a passage that", *sequences, "runs with the same tokens"), lines)
