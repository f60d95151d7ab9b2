"""Layers that differ: reports of bench_layer_groups and bench_layer_formats."""

from __future__ import annotations

from tables.report import Report, Reports, between, brief, table

LENGTHS = {1024: "1K", 8192: "8K", 32768: "32K", 131072: "128K"}
FORMATS = ("native", "int8", "int2")
ALL_KEPT, BY_ARITHMETIC = "one group that keeps all", "layer blocks, by arithmetic"
DIVERGENCE = "KL from native"
BOOKS = ("austen-persuasion", "melville-moby_dick", "chesterton-brown")


def share(report: Report, model: str, length: int) -> float:
    """Of one group's blocks, by arithmetic."""
    return 1 / report.ratio(f"{model}, {length} tokens", BY_ARITHMETIC, ALL_KEPT)


def group_memory(report: Report) -> tuple[list[float], dict[str, list[float]]]:
    """MiB by length: in one group that keeps all, native, and in groups by format."""
    cases = [f"Gemma-3-1b, {length} tokens" for length in LENGTHS]
    held = {name: [report.value(case, f"held, {name}") for case in cases] for name in FORMATS}
    # A block takes as much in one group as in several, so that sizes are as numbers of blocks.
    blocks = [report.row(case, "layer blocks, native", ALL_KEPT) for case in cases]
    whole = [
        size * row["baseline_value"] / row["value"]
        for size, row in zip(held["native"], blocks, strict=True)
    ]
    return whole, held


def groups(reports: Reports) -> str:
    report = reports["layer_groups"]
    whole, held = group_memory(report)
    beside = [
        report.row(f"Gemma-3-1b, {length} tokens", "held, native")["baseline_value"]
        for length in LENGTHS
    ]
    lines = [
        ("one group that keeps all, `native`", *map(megabytes, whole)),
        *((f"groups, `{name}`", *map(megabytes, sizes)) for name, sizes in held.items()),
        ("vLLM 0.32, hybrid manager", *map(megabytes, beside)),
    ]
    return table(("Gemma-3-1b shape, MiB", *LENGTHS.values()), lines)


def megabytes(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"


def group_steps(reports: Reports) -> str:
    report = reports["layer_groups"]
    shares = [share(report, model, 32768) for model in ("Gemma-3-1b", "gpt-oss-20b")]
    steps = [
        report.row(
            f"decode step of 1024, {count} group{'s' * (count != 'one')}", "with append, int8"
        )
        for count in ("one", "two", "seven")
    ]
    ours = ", ".join(f"{row['value']:.0f}" for row in steps)
    theirs = ", ".join(f"{row['baseline_value']:,.0f}" for row in steps)
    rates = [row["ratio"] for row in report.rows if row["metric"] == "hit rate"]
    return (
        f"At 32K that is {shares[0]:.2f} of one group's blocks, {shares[1]:.2f} for gpt-oss, half "
        f"of whose layers keep all. Hit rates on shared prompts are {between(rates, '{:.2f}')} of "
        "vLLM's. A step of 1024 sequences, tokens appended, takes with one, two and seven groups "
        f"{ours} us in `int8`, vLLM's manager {theirs} us."
    )


def chosen(reports: Reports) -> str:
    report = reports["layer_formats"]
    lines = []
    for name in ("int3", "k4v2", "int4"):
        rows = [report.row(f"for the bytes of {name}, {book}", DIVERGENCE) for book in BOOKS]
        size = report.row(f"for the bytes of {name}, {BOOKS[0]}", "bytes of a token")
        lines.append(
            (
                f"{size['baseline_value']:.0f}",
                f"`{name}`",
                " / ".join(brief(row["baseline_value"]) for row in rows),
                " / ".join(brief(row["value"]) for row in rows),
                between((1 / row["ratio"] for row in rows), "{:.2f}"),
            )
        )
    head = ("bytes of a token, all layers", "one format", "KL, mnat", "chosen by layer", "ratio")
    return table(head, lines)
