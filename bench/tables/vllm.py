"""The plugin inside vLLM's CPU engine: reports of bench_vllm."""

from __future__ import annotations

from tables.report import Report, Reports, between, table

CACHES = ("vLLM auto", "vLLM fp8", "native", "int8", "int4", "int2")
WORKLOADS = {
    "equal batch": "memory for all, 128 + 64 tokens",
    "equal memory": "160 MiB, 256 + 96 tokens",
    "repeated prompts": "160 MiB, 300 + 48 tokens, asked again",
}
HOLDING = ("vLLM auto", "vLLM fp8", "int8", "int4", "int3", "int2", "int2-long")


def cell(report: Report, case: str) -> str:
    return f"{report.value(case, 'throughput'):.0f} ({report.value(case, 'first token'):.1f} s)"


def throughput(reports: Reports) -> str:
    report = reports["vllm"]
    lines = [
        (label, *(cell(report, f"{workload}, {name}") for name in CACHES))
        for workload, label in WORKLOADS.items()
    ]
    side_by_side = (
        f"{report.value(f'equal memory, {name}', 'decoding side by side'):.0f}" for name in CACHES
    )
    lines.append(("160 MiB: requests decoded side by side", *side_by_side))
    planning = (f"{report.value(f'planning 64, {name}', 'planning'):.0f}" for name in CACHES)
    lines.append(("planning a step of 64 requests, us", *planning))
    return table(("tokens/s (first token)", *CACHES), lines)


def memory(reports: Reports) -> str:
    report = reports["vllm_memory"]
    tokens = [report.value(f"memory, {name}", "tokens") for name in HOLDING]
    lines = [
        ("tokens", *(f"{count:,}" for count in tokens)),
        ("times vLLM auto", *(f"{count / tokens[0]:.2f}" for count in tokens)),
    ]
    return table(("", *HOLDING), lines)


def budget(reports: Reports) -> str:
    report = reports["vllm_budget"]
    metrics = (
        ("decoding side by side", "{:.0f}"),
        ("side by side, mean", "{:.1f}"),
        ("throughput", "{:.0f}"),
        ("first token", "{:.0f}"),
        ("between tokens", "{:.0f}"),
    )
    head = ("", "side by side, at most", "on average", "tokens/s", "first token, s", "between, ms")
    lines = [
        (name, *(form.format(report.value(f"budget, {name}", metric)) for metric, form in metrics))
        for name in ("vLLM auto", "native", "int8", "int2")
    ]
    gains = []
    for name in ("int8", "int2"):
        mean, tokens = (
            report.value(f"budget, {name}", metric) / report.value("budget, native", metric)
            for metric in ("side by side, mean", "throughput")
        )
        peak = report.ratio(f"budget, {name}", "decoding side by side", "vLLM auto")
        gains.append(
            f"`{name}`: {peak:.2f} times the requests of vLLM's own cache at most, {mean:.2f} "
            f"times `native`'s on average, {tokens:.2f} times its tokens/s"
        )
    return "\n\n".join((table(head, lines), "; ".join(gains) + "."))


def gain(reports: Reports) -> str:
    report = reports["vllm"]
    gains = [
        report.ratio(f"equal memory, {name}", "throughput", "vLLM auto")
        for name in ("int8", "int4", "int2")
    ]
    return (
        f"In 160 MiB `int8`, `int4` and `int2` decode {between(gains)} times the tokens a second "
        "of vLLM's own cache."
    )
