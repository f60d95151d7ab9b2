"""Fleets on paper: the report of bench_fleet."""

from __future__ import annotations

from tables.report import Report, Reports, code, table

FORMATS = ("native", "int8", "int4", "int2")
READ_AS_NATIVE = "int2, read as native"
POLICIES = (
    *("round robin", "random", "two choices", "session affinity", "prefix affinity"),
    "KV-aware",
)
LOADS = ("0.5", "0.75", "1", "1.5", "2", "2.5")
CARDS = ("L4", "H100")
KEPT, HIT, GOOD = "requests that keep the limits", "hit rate", "goodput"
FIRST, BETWEEN = "time to first token, p99", "between tokens, p99"
HALF = ", half of 95 %"


def with_half(report: Report, case: str, metric: str, form: str = "{:.1f}") -> str:
    """A mean over seeds, and half of its 95 % interval where there are several."""
    mean, half = report.value(case, metric), report.value(case, metric + HALF)
    if report.value("simulated", "seeds") < 2:
        return form.format(mean)
    return f"{form.format(mean)} ± {form.format(half)}"


def simulated(reports: Reports) -> str:
    report = reports["fleet"]
    traces, steps, speed, seeds, seconds = (
        report.value("simulated", metric)
        for metric in (
            *("replica-traces", "steps", "steps a second of a core", "seeds"),
            "seconds of each run",
        )
    )
    which = f"seeds 0 to {seeds - 1:.0f}" if seeds > 1 else "seed 0 alone"
    return (
        f"This report is of {which}: {traces:,.0f} replica-traces (one replica in one run), "
        f"{steps / 1e6:.1f} million steps of the real scheduler and block manager, at {speed:,.0f} "
        "steps a second of a core, arrivals, routing and hashing included. In a run conversations "
        f"arrive for {seconds:.0f} seconds (H100: half as long), from empty caches on; requests of "
        "the first quarter are served and not counted."
    )


def paper(reports: Reports) -> str:
    report = reports["fleet"]
    lines = []
    for card in CARDS:
        for name in FORMATS:
            case = f"paper, {card}, {name}"
            lines.append(
                (
                    f"{card}, `{name}`",
                    f"{report.value(case, 'keys and values'):.1f} GB",
                    f"{report.value(case, 'a sealed token') / 1024:.1f} KiB",
                    f"{report.value(case, 'tokens that fit'):,.0f}",
                    f"{report.value(case, 'a step'):.1f} ms",
                    f"{report.value(case, 'a token'):.0f} us",
                    f"{report.value(case, 'a GB read'):.2f} ms",
                )
            )
    head = (
        *("machine", "keys and values", "a sealed token", "tokens that fit"),
        *("a step takes", "and for each token", "and for each GB read"),
    )
    return table(head, lines)


def by_policy(report: Report, experiment: str) -> str:
    lines = []
    for policy in POLICIES:
        cells = [policy]
        for name in ("native", "int2"):
            case = f"{experiment}, {policy}, {name}"
            cells.append(with_half(report, case, HIT))
            cells.append(with_half(report, case, KEPT))
            cells.append(f"{report.value(case, FIRST):.1f}")
        lines.append(tuple(cells))
    head = ["policy"]
    for name in ("native", "int2"):
        head += [f"`{name}`: hit rate, %", "keep the limits, %", "first token, p99, s"]
    return table(head, lines)


def policies(reports: Reports) -> str:
    return by_policy(reports["fleet"], "policies")


def deaths(reports: Reports) -> str:
    report = reports["fleet"]
    cases = [f"deaths, {policy}, {name}" for policy in POLICIES for name in ("native", "int2")]
    died, moved, asked = (
        sum(report.value(case, metric) for case in cases) / len(cases)
        for metric in ("deaths", "requests moved", "requests")
    )
    told = (
        f"In a run {died:.0f} replicas die and {moved:.0f} requests begin again elsewhere, on "
        f"average; {asked:.0f} requests are counted."
    )
    return f"{by_policy(report, 'deaths')}\n\n{told}"


def formats(reports: Reports) -> str:
    report = reports["fleet"]
    lines = []
    for name in FORMATS:
        case = f"policies, KV-aware, {name}"
        lines.append(
            (
                f"`{name}`",
                with_half(report, case, HIT),
                with_half(report, case, KEPT),
                with_half(report, case, GOOD),
                f"{report.value(case, 'output tokens'):,.0f}",
                " / ".join(
                    f"{report.value(case, m):.0f}" for m in ("between tokens, p50", BETWEEN)
                ),
                f"{report.value(case, 'memory in use'):.0f}",
                f"{report.value(case, 'preemptions'):.1f}",
            )
        )
    head = (
        *("format", "hit rate, %", "keep the limits, %", "goodput, requests/s"),
        *("output tokens/s", "between tokens, p50 / p99, ms", "memory in use, %"),
        "preemptions of 1000 requests",
    )
    return table(head, lines)


def loads(reports: Reports) -> str:
    report = reports["fleet"]
    lines = [
        (
            f"`{name}`",
            *(f"{report.value(f'load {load}, {name}', KEPT):.0f}" for load in LOADS),
        )
        for name in FORMATS
    ]
    return table(("keep the limits, %, at", *LOADS), lines)


def machines(reports: Reports) -> str:
    report = reports["fleet"]
    lines = []
    for name in (*FORMATS, READ_AS_NATIVE):
        first, comma, rest = name.partition(",")
        cells = [f"`{first}`{comma}{rest}"]
        for card in CARDS:
            case = f"machines, {card}, {name}"
            fewest, most = (
                report.value(case, metric) for metric in ("fewest machines", "most machines")
            )
            spread = f"{fewest:.0f}" if fewest == most else f"{fewest:.0f} to {most:.0f}"
            cells.append(f"{report.value(case, 'machines'):.1f} ({spread})")
            cells.append(with_half(report, case, "native's machines", "{:.2f}"))
        lines.append(tuple(cells))
    head = ["format"]
    for card in CARDS:
        head += [f"{card} cards, mean (least to most)", "native's, times as many"]
    return table(head, lines)


def checks(reports: Reports) -> str:
    report = reports["fleet"]
    lines = []
    for busy in ("0.5", "0.8"):
        row = report.row(f"checks, one at a time, {busy} busy", "wait")
        lines.append(
            (
                f"wait in a queue of one server, {busy} busy, in services (M/D/1)",
                f"{row['baseline_value']:.2f}",
                f"{row['value']:.2f}",
            )
        )
    metrics = {
        "preemptions": ("preemptions", "{:.0f}"),
        "sequences at once, while others wait": ("sequences at once, while others wait", "{:.1f}"),
        "output tokens": ("output tokens a second", "{:.0f}"),
        "between tokens, p50": ("between tokens, median, ms", "{:.0f}"),
    }
    for metric, (label, form) in metrics.items():
        for name in ("native", "int8", "int2"):
            row = report.row(f"checks, SmolLM2 on a CPU, {name}", metric)
            lines.append(
                (
                    f"SmolLM2 on a CPU, `{name}`: {label}",
                    form.format(row["baseline_value"]),
                    form.format(row["value"]),
                )
            )
    return table(("what", "known", "simulated"), lines)


def fitted(reports: Reports) -> str:
    report = reports["fleet"]
    step, token = (
        report.value("checks, SmolLM2 on a CPU", metric) for metric in ("a step", "a token")
    )
    return (
        f"Of the measured run ({code(['bench/results/budget.json'])}) the whole times are used, "
        f"three numbers, to fit two: {step:.1f} ms for each step and {token:.2f} ms for each token "
        "that it computes. Preemptions hang on no time, and have to be equal."
    )
