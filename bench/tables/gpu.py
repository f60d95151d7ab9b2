"""A GPU's kernels, without one: reports of bench_machine_code and `make test-ptx`."""

from __future__ import annotations

from tables.report import Report, Reports, table

FORMATS = ("native", "int8", "int4", "k4v2", "int3", "int2", "int2-long")
COUNT = "warp-instructions"


def density(report: Report, kernel: str, sm: int, kv_format: str, rows: str) -> str:
    case = f"{kernel}, sm_{sm}, D=128, {kv_format}, {rows} rows"
    return f"{report.value(case, COUNT):.3f}"


def instructions(reports: Reports) -> str:
    report = reports["machine_code"]
    lines = []
    for kv_format in FORMATS:
        kernel = "attend_open" if kv_format == "native" else "attend_sealed"
        few = [density(report, kernel, sm, kv_format, "few") for sm in (90, 80)]
        chunk = (
            [density(report, "attend_prefill", sm, kv_format, "many") for sm in (90, 80)]
            if kv_format != "native"
            else ["", ""]
        )
        lines.append((f"`{kv_format}`", *few, *chunk))
    head = ("format", "decoding, sm_90", "decoding, sm_80", "prefill, sm_90", "prefill, sm_80")
    return f"{table(head, lines)}\n\n{spills(report)}"


def spills(report: Report) -> str:
    rows = [row for row in report.rows if row["metric"] == "spilled"]
    spilling = [row for row in rows if row["value"]]
    kernels = {row["case"].partition(",")[0] for row in spilling}
    if kernels & {"attend_open", "attend_sealed", "attend_prefill"}:
        raise ValueError(f"{kernels} spill: this page says that attention does not")
    names = {row["case"].split(", ")[3] for row in spilling}
    most = max(row["value"] for row in spilling)
    return (
        f"Of {len(rows)} kernels {len(spilling)} spill registers, at most {most} bytes of a "
        f"thread: {', '.join(sorted(f'`{kernel}`' for kernel in kernels))} of "
        f"{', '.join(sorted(f'`{name}`' for name in names))}. None with a loop over context does."
    )


def emulated(reports: Reports) -> str:
    report = reports["ptx"]
    count, failing = (report.value("all", metric) for metric in ("cases", "cases that fail"))
    return (
        f"Compiled for sm_80 and sm_90 and run on an emulated GPU, {count - failing} of {count} "
        "cases give what the definition gives (`make test-ptx`)."
    )
