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


def budget(reports: Reports) -> str:
    report = reports["vllm_budget"]
    lines = []
    for name in ("vLLM auto", "native", "int8", "int8/0", "int2"):
        case = f"budget, {name}"
        cells = [name if name.startswith("vLLM") else f"`{name}`"]
        for metric, form in (
            ("running side by side", "{:.0f}"),
            ("side by side, mean", "{:.1f}"),
            ("throughput", "{:.0f}"),
            ("first token", "{:.0f}"),
        ):
            cells.append(form.format(report.value(case, metric)))
        lines.append(tuple(cells))
    head = ("", "requests side by side, most", "mean", "tokens/s", "first token, s")
    return table(head, lines)
