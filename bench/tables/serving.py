"""Serving on a CPU, end to end, beside transformers: the report of bench_throughput."""

from __future__ import annotations

from tables.report import Reports, table, times

FORMATS = ("native", "int8", "int4", "int2")
SPEED = "output tokens/s"
PEERS = {
    "transformers continuous batching": "transformers, continuous batching",
    "static batches of 8, sorted": "static batches of 8, sorted by output length (known to nobody)",
    "QuantizedCache, quanto 0.2.7, 4-bit": "`QuantizedCache`, quanto 4 bits, the same batches",
    "sequential generate": "one request after the other",
    "static batches of 8": "static batches of 8 in order of arrival",
}  # fmt: skip
PARTS = {
    "model: GEMMs": "the model's products",
    "model: all else": "the rest of the model",
    "attention and storing K/V": "attention and storing",
    "scheduler and bookkeeping": "scheduler and block manager",
    "index arrays of the step": "the step's index arrays",
    "sampling": "sampling",
}
PROFILE = "1 thread, native, profile of "
TOGETHER, BEST = "dense cache, all in one batch", "dense cache, best static batch, foreknowledge"


def throughput(reports: Reports) -> str:
    report = reports["throughput"]
    lines = []
    for name in FORMATS:
        speeds = [report.value(f"{count}, {name}", SPEED) for count in ("1 thread", "2 threads")]
        lines.append((f"`{name}`", f"{speeds[0]:.0f}", "", f"{speeds[1]:.0f}", ""))
    for name, label in PEERS.items():
        cells = []
        for count in ("1 thread", "2 threads"):
            speed = report.value(f"{count}, {name}", SPEED)
            cells += [f"{speed:.0f}", times(report.value(f"{count}, native", SPEED) / speed)]
        lines.append((label, *cells))
    head = ("tokens/s", "1 thread", "`native` is", "2 threads", "`native` is")
    differing = sum(row["value"] for row in report.rows if row["metric"] == "requests that differ")
    if differing:
        raise ValueError(f"{differing} requests differ: this page says that none does")
    return f"{table(head, lines)}\n\nIn `native` no request's tokens differ from `generate()`'s."


def step(reports: Reports) -> str:
    report = reports["throughput"]
    (case,) = {row["case"] for row in report.rows if row["case"].startswith(PROFILE)}
    whole = sum(
        row["value"] for row in report.rows if row["case"] == case and row["unit"] == "ms/step"
    )
    parts = ", ".join(
        f"{label} {report.value(case, name, unit='%'):.2g} %" for name, label in PARTS.items()
    )
    return f"Of a step of {whole:.0f} ms in `native`, one thread: {parts}."


def memory(reports: Reports) -> str:
    report = reports["throughput"]
    peaks = [report.value(f"1 thread, {name}", "peak KV memory") for name in FORMATS]
    row = report.row("1 thread, native", "peak KV memory", TOGETHER)
    sorted_batch = report.row("1 thread, native", "peak KV memory", BEST)
    told = ", ".join(
        f"{peak:.1f} MiB (`{name}`)" for name, peak in zip(FORMATS, peaks, strict=True)
    )
    return (
        f"Keys and values take {told} at most, where a dense cache takes "
        f"{row['baseline_value']:.0f} MiB for all requests in one batch and "
        f"{sorted_batch['baseline_value']:.1f} MiB for a sorted batch of 8."
    )
