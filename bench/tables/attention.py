"""Attention on a CPU beside torch's SDPA: the report of bench_attention."""

from __future__ import annotations

from tables.report import Report, Reports, between, table, times

SHAPES = {
    "16x2048 8/2 64": "16x2048, 8/2, 64",
    "64x512 8/8 64": "64x512, 8/8, 64",
    "4x8192 32/8 128": "4x8192, 32/8, 128",
    "32 ragged 16-4096 8/2 64": "32 ragged 16-4096, 8/2, 64",
}
FORMATS = {
    "int8": "`int8`",
    "int4": "`int4`",
    "int2": "`int2`",
    "native bf16": "`native` bf16",
    "native fp32": "`native` fp32",
}
TORCH, ALONE = "torch backend", "per-sequence SDPA"
CHUNK, IN_BF16 = "prefill chunk 512 on 4096 context", "prefill chunk 512 on 4096 context, in bf16"


def beside_sdpa(report: Report, shape: str, name: str) -> float:
    """The first baseline is the fastest of SDPA's variants on contiguous keys and values."""
    return report.ratio(f"{shape}, {name}", "decode us")


def decode(reports: Reports) -> str:
    report = reports["attention_cpu"]
    lines = [
        (label, *(times(beside_sdpa(report, shape, name)) for shape in SHAPES))
        for name, label in FORMATS.items()
    ]
    fallback = [
        beside_sdpa(report, shape, "int8") / report.ratio(f"{shape}, int8", "decode us", TORCH)
        for shape in SHAPES
    ]
    lines.append(("torch fallback, `int8`", *map(times, fallback)))
    ragged = report.ratio("32 ragged 16-4096 8/2 64, int8", "decode us", ALONE)
    shares = {
        name: report.ratio(f"64x512 8/8 64, {name}", "needed bytes read")
        for name in ("int8", "native fp32")
    }
    return (
        f"{table(('decode: batch x context, heads, head_dim', *SHAPES.values()), lines)}\n\n"
        "Of ragged lengths SDPA needs a mask over the longest; beside one SDPA call for each "
        f"sequence's own length `int8` is {times(ragged)}. 64x512 is near what memory gives: "
        f"`int8` reads at {100 * shares['int8']:.0f} % and `native` fp32 at "
        f"{100 * shares['native fp32']:.0f} % of the machine's rate of random 16 KB reads."
    )


def other_calls(reports: Reports) -> str:
    report = reports["attention_cpu"]
    chunk = [report.ratio(f"{CHUNK}, {name}", "prefill us") for name in FORMATS]
    in_bf16 = [report.ratio(f"{IN_BF16}, {name}", "prefill us") for name in FORMATS]
    calls = [report.value(f"call 1x16 1/1 64, {name}", "call us") for name in FORMATS]
    appends = [report.value(f"append 64 sequences, {name}", "append us") for name in FORMATS]
    return (
        f"A prefill chunk of 512 tokens on 4096 of context is {between(chunk)} times as fast as "
        f"SDPA in fp32, {between(in_bf16)} times in bf16. The smallest call (one sequence of 16 "
        f"tokens, one head) takes {between(calls, '{:.0f}')} us; appending a token to each of 64 "
        f"sequences with 8 kv heads adds {between(appends, '{:.0f}')} us. Relative error against "
        f"float64 is at most {most_error(report, ('native fp32', 'native bf16', 'int8')):.2g} ppm "
        f"in `native` and `int8`, {most_error(report, ('int4', 'int2')):.2g} ppm in `int4` and "
        "`int2`, and in prompts that are computed in bf16 "
        f"{most_error(report, tuple(FORMATS), in_bf16=True) / 1e4:.2f} %, bf16's own rounding."
    )


def most_error(report: Report, names: tuple[str, ...], *, in_bf16: bool = False) -> float:
    errors: list[float] = [
        row["value"]
        for row in report.rows
        if row["metric"] == "relative error"
        and row["case"].rpartition(", ")[2] in names
        and row["case"].startswith(IN_BF16) == in_bf16
    ]
    return max(errors)
