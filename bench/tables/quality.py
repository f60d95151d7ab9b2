"""What formats and peers do to a real model's predictions: reports of bench_quality."""

from __future__ import annotations

from tables.report import Report, Reports, between, brief, code, signed, table

BYTES, DIVERGENCE = "bytes of a token and kv head", "KL from native"
AGREEMENT, ABOVE = "top-1 agreement", "perplexity above native"
BOOKS = ("austen-persuasion, 1 x 2048 tokens", "melville-moby_dick, 1 x 2048 tokens")
SHOWN = {
    "int8": "`int8`",
    "int8 in float16": "`int8`, the rest in float16",
    "int4": "`int4`",
    "int3": "`int3`",
    "k4v2": "`k4v2`",
    "int2": "`int2`",
    "int2-long": "`int2-long`",
    "KIVI-4": "KIVI, 4 bits",
    "KIVI-2": "KIVI, 2 bits",
    "quanto-like 4": "quanto-like, 4 bits",
    "TurboQuant-like 4": "TurboQuant-like, 4 bits",
    "TurboQuant-like 3": "TurboQuant-like, 3 bits",
    "llama.cpp q8_0, rotated": "llama.cpp q8_0, rotated",
    "llama.cpp q4_0, rotated": "llama.cpp q4_0, rotated",
    "fp8 e4m3": "fp8 e4m3",
}
OURS = ("int8", "int8-token", "int4", "int3", "k4v2", "int2", "int2-long", "kivi2")
NUM_CHANNELS = 64  # of SmolLM2's heads
RECALLED = "pairs recalled"


def pair(report: Report, case: str, metric: str) -> list[float]:
    """Of each book."""
    return [report.value(f"{case}, {book}", metric) for book in BOOKS]


def formats(reports: Reports) -> str:
    report = reports["quality_real"]
    lines = []
    for case, label in SHOWN.items():
        divergence = " / ".join(map(brief, pair(report, case, DIVERGENCE)))
        agreement = " / ".join(f"{value:.1f}" for value in pair(report, case, AGREEMENT))
        above = " / ".join(map(signed, pair(report, case, ABOVE)))
        size = f"{report.value(case, BYTES):.0f}"
        lines.append((label, size, divergence, f"{agreement} %", f"{above} %"))
    head = ("format", "bytes", "KL, mnat", "same first choice", "perplexity")
    errors = [
        report.value(f"{case}, {book}", "KL, standard error")
        / report.value(f"{case}, {book}", DIVERGENCE)
        for case in SHOWN
        for book in BOOKS
    ]
    near = [
        brief(pair(report, case, DIVERGENCE)[0])
        for case in ("KIVI-4, head + tail", "TurboQuant-like 3, head + tail")
    ]
    rotated = pair(report, "llama.cpp q8_0, rotated, head + tail", DIVERGENCE)
    int8 = pair(report, "int8", DIVERGENCE)
    bytes_of = [report.value(case, BYTES) for case in ("KIVI-4", "llama.cpp q8_0, rotated")]
    return (
        f"{table(head, lines)}\n\n"
        "A standard error is "
        f"{between(errors, '{:.0%}').replace('%', ' %')} of its figure. "
        "Given a head and a tail as ours, peers come closer: in the first novel "
        f"KIVI's 4 bits to {near[0]} mnat, in {bytes_of[0]:.0f} bytes, TurboQuant's 3 bits to "
        f"{near[1]}. "
        f"Rotated q8_0 ({bytes_of[1]:.0f} bytes) then has {' and '.join(map(brief, rotated))}, "
        f"where `int8` has {' and '.join(map(brief, int8))}."
    )  # fmt: skip


def own_formats(reports: Reports) -> str:
    """Ours alone, for who chooses one."""
    report = reports["quality_real"]
    lines = [("`native`, bf16", f"{2 * 2 * NUM_CHANNELS}", "", "")]  # keys and values, two bytes
    for case in OURS:
        divergence = " / ".join(map(brief, pair(report, case, DIVERGENCE)))
        agreement = " / ".join(f"{value:.1f}" for value in pair(report, case, AGREEMENT))
        size = f"{report.value(case, BYTES):.0f}"
        lines.append((f"`{case}`", size, divergence, f"{agreement} %"))
    return table(("format", "bytes", "KL, mnat", "same first choice"), lines)


def first_tokens(reports: Reports) -> str:
    report = reports["quality_first_tokens"]
    lines = []
    for case in ("int8", "int8/0", "int8-token@64/0"):
        cells = [f"`{case}`"]
        for length in (512, 2048):
            books = [book.replace("2048", str(length)) for book in BOOKS]
            found = (report.value(f"{case}, {book}", DIVERGENCE) for book in books)
            held = report.value(case, f"the same, of {length} tokens with head and tail")
            cells += [" / ".join(map(brief, found)), f"{held:.0f}"]
        lines.append(tuple(cells))
    head = ("", "KL, mnat, of 512 tokens", "bytes held", "of 2048 tokens", "bytes held")
    return table(head, lines)


def recall(reports: Reports) -> str:
    report = reports["quality_recall"]
    by_count: dict[int, list[str]] = {}
    for row in report.rows:
        if row["metric"] == RECALLED:
            by_count.setdefault(int(row["value"]), []).append(row["case"])
    unit = report.row("native", RECALLED)["unit"]
    pairs = unit.removeprefix("of ")
    told = "; ".join(
        f"{count}: {code(names)}" for count, names in sorted(by_count.items(), reverse=True)
    )
    return f"Of {pairs} pairs hidden in 0.8K to 6K tokens these are recalled. {told}."


def long_context(reports: Reports) -> str:
    report = reports["quality_8192"]
    window = "austen-persuasion, 1 x 8192 tokens"
    cases = [row["case"] for row in report.rows if row["metric"] == BYTES]
    lines = [
        (
            case if case.startswith(("KIVI", "llama")) else f"`{case}`",
            f"{report.value(case, BYTES):.0f}",
            brief(report.value(f"{case}, {window}", DIVERGENCE)),
            f"{report.value(f'{case}, {window}', AGREEMENT):.1f} %",
            f"{signed(report.value(f'{case}, {window}', ABOVE))} %",
        )
        for case in cases
    ]
    return table(("format", "bytes", "KL, mnat", "same first choice", "perplexity"), lines)


def continuations(reports: Reports) -> str:
    report = reports["continuations"]
    same = sorted(row["value"] for row in report.rows if row["metric"] == "tokens as native")
    middle = len(same) // 2
    median = (same[middle - 1] + same[middle]) / 2 if len(same) % 2 == 0 else same[middle]
    whole = report.row("int2", "continuations as native")
    repeated = [report.value(name, "runs of 4 tokens repeated") for name in ("native", "int2")]
    return (
        f"Greedy continuations of {len(same)} passages of 500 to 3000 tokens, `native` and `int2` "
        "side by side, are there to read in `bench/results/continuations.md`. They part after "
        f"{median:g} tokens in the median; {whole['value']:.0f} {whole['unit']} do not within "
        f"{same[-1]:.0f}. Of their runs of four tokens {repeated[0]:.0f} % (`native`) and "
        f"{repeated[1]:.0f} % (`int2`) have come before: so small a model goes in circles when it "
        "is greedy."
    )
