"""SmolLM2 served by other engines on a CPU: reports of bench_peers."""

from __future__ import annotations

from tables.report import Report, Reports, between, brief, table

WORKLOADS = {
    "short": "32 of 128 + 128",
    "long": "16 of 1500 + 64",
    "one": "1 of 4000 + 64",
    "mixed": "64 of lognormal lengths",
    "shared": "32 that share 1000, prefix caches on",
}
ENGINES = {
    "ours native": "ours native",
    "ours int8": "ours int8",
    "vLLM": "vLLM 0.32 CPU",
    "OpenVINO u8": "OpenVINO GenAI 2026.4, u8 cache",
    "llama.cpp f16": "llama.cpp, f16 cache",
}
SPEED, FIRST, GAP = "throughput", "first token", "between tokens, median"


def cell(report: Report, case: str) -> str:
    """Output tokens a second, and seconds to the first token."""
    return f"{brief(report.value(case, SPEED))} ({brief(report.value(case, FIRST))})"


def throughput(reports: Reports) -> str:
    report = reports["peers"]
    lines = [
        (label, *(cell(report, f"{workload}, {engine} bfloat16") for engine in ENGINES))
        for workload, label in WORKLOADS.items()
    ]
    return table(("requests of tokens", *ENGINES.values()), lines)


def beside(reports: Reports) -> str:
    report = reports["peers"]
    gaps = [
        ", ".join(
            f"{report.value(f'{workload}, {engine} bfloat16', GAP):.0f}" for engine in ENGINES
        )
        for workload in ("short", "one")
    ]
    others = {
        name: brief(report.value(f"short, {name} bfloat16", SPEED))
        for name in ("llama.cpp q8_0", "transformers padded", "transformers batching")
    }
    later = [
        100 * (1 / report.ratio(f"{workload}, {name} bfloat16", FIRST) - 1)
        for workload in ("long", "one")
        for name in ("ours native", "ours int8")
    ]
    return (
        f"Of the first row llama.cpp with a q8_0 cache has {others['llama.cpp q8_0']}, "
        f"transformers by `generate()` on padded batches {others['transformers padded']} and by "
        f"its continuous batching {others['transformers batching']}. Milliseconds between tokens "
        f"are {gaps[0]} in the first row, {gaps[1]} in the third, in the order of the columns. "
        f"First tokens of long prompts come later than OpenVINO's, by {between(later, '{:.0f}')} "
        "%."
    )


def memory(reports: Reports) -> str:
    report = reports["peers"]
    taken = {
        engine: between(
            (report.value(f"{name}, {engine} bfloat16", "memory") / 1024 for name in WORKLOADS),
            "{:.1f}",
        )
        for engine in ENGINES
    }
    caches = {name: report.value(f"short, {name} bfloat16", "cache") for name in ENGINES}
    return (
        f"The process takes {taken['ours native']} GiB in native and {taken['ours int8']} in int8 "
        f"(OpenVINO {taken['OpenVINO u8']}, vLLM {taken['vLLM']}, llama.cpp "
        f"{taken['llama.cpp f16']}), the cache of the first row {caches['ours int8']:.0f} MiB in "
        f"int8, {caches['ours native']:.0f} in bfloat16, {caches['OpenVINO u8']:.0f} in "
        "OpenVINO's u8."
    )


def older_machine(reports: Reports) -> str:
    report = reports["peers_zen4"]
    engines = {name: label for name, label in ENGINES.items() if not name.startswith("llama")}
    lines = [
        (dtype, *(cell(report, f"short, {engine} {dtype}") for engine in engines))
        for dtype in ("bfloat16", "float32")
    ]
    equal = {
        name: report.value(f"short, {name} float32", "equal requests")
        for name in ("vLLM", "ours int8", "OpenVINO u8")
    }
    return (
        f"{table((WORKLOADS['short'], *engines.values()), lines)}\n\nIn float32 the tokens of our "
        f"native cache come for all {equal['vLLM']:.0f} requests of vLLM, "
        f"{equal['ours int8']:.0f} of ours in int8 and {equal['OpenVINO u8']:.0f} of OpenVINO."
    )
