"""A model in several processes beside one: the report of bench_tensor_parallel."""

from __future__ import annotations

from tables.report import Reports, table

CASES = {
    "of its sizes, native, 2 processes": "its sizes, 4 kv heads, `native`, 2 processes",
    "of its sizes, int8, 2 processes": "its sizes, 4 kv heads, `int8`, 2 processes",
    "the model, int8, 3 processes": "SmolLM2-135M, `int8`, 3 processes",
}
MEMORY = ("private memory of rank 0", "private memory of another rank")


def sizes(reports: Reports) -> str:
    report = reports["tensor_parallel"]
    lines = []
    for case, label in CASES.items():
        rates = [f"{report.ratio(case, f'{what}, tokens a second'):.2f}" for what in
                 ("decode", "prefill")]  # fmt: skip
        one = report.row(case, MEMORY[0])["baseline_value"]
        memory = [f"{report.value(case, metric):.0f}" for metric in MEMORY]
        same = report.row(case, "sequences with the same tokens")
        equal = f"{same['value']:.0f} of {same['baseline_value']:.0f}"
        lines.append((label, *rates, f"{one:.0f}", *memory, equal))
    heads = (
        "", "decode", "prefill", "MiB of one process", "of rank 0", "of another rank",
        "sequences with the same tokens",
    )  # fmt: skip
    return table(heads, lines)
