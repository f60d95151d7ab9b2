"""What `paged-kv bench` is asked of workloads and memory, as workloads and sizes of pools.

Knows arguments, never how anything is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..benchmarks.trace import Encode, read_trace
from ..benchmarks.workloads import (
    SHAPES,
    Lengths,
    Shape,
    Workload,
    all_at_once,
    check_lengths,
    fitted,
    make_workload,
    poisson_arrivals,
    with_limits,
)
from ..errors import InvalidRequestError
from ..units import parse_memory
from ..validation import require_count
from .result_file import explained

QUICK_REQUESTS, QUICK_TOKENS, QUICK_RATE = 4, 200, 50.0
REQUESTS, REPEATS, RATE = 64, 3, 1.0
LENGTHS: Final = {  # options, by what of a shape they say
    "inputs": ("input_median", "input_sigma", "max_input"),
    "outputs": ("output_median", "output_sigma", "max_output"),
}


def add_workload(parser: argparse.ArgumentParser, *, has_arrivals: bool) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--workload",
        default="lognormal",
        metavar="NAME",
        help=f"{', '.join(SHAPES)} (lognormal), or a trace: a .jsonl file",
    )
    group.add_argument("--requests", type=int, help=f"how many ({REQUESTS}; of a trace all)")
    group.add_argument("--seed", type=int, default=0, help="of lengths, tokens and arrivals (0)")
    for what in ("input", "output"):
        group.add_argument(f"--{what}-median", type=float, metavar="TOKENS", help="in place of its")
        group.add_argument(f"--{what}-sigma", type=float, help="of the logarithm; 0: all alike")
        group.add_argument(f"--max-{what}", type=int, metavar="TOKENS", help="what is more is cut")
    group.add_argument("--shared-tokens", type=int, metavar="TOKENS", help="same in all prompts")
    if has_arrivals:
        group.add_argument(
            "--rate",
            type=float,
            metavar="N",
            help=f"requests a second, a Poisson process ({RATE:g}; of a trace its own times)",
        )
    group.add_argument("--max-ttft", type=float, metavar="MS", help="goodput: to the first token")
    group.add_argument(
        "--max-itl", type=float, metavar="MS", help="goodput: from token to token, on average"
    )
    group.add_argument("--repeats", type=int, help=f"runs of each format ({REPEATS})")


def check_workload(arguments: argparse.Namespace) -> None:
    """Refuse what can be told without a model, each value by name."""
    trace = trace_of(arguments)
    if trace is None and arguments.workload not in SHAPES:
        known = ", ".join(SHAPES)
        raise InvalidRequestError(
            f"--workload {arguments.workload!r} is none of {known}, nor a .jsonl file"
        )
    for name in ("requests", "repeats", "max_input", "max_output", "native_sequences"):
        if getattr(arguments, name) is not None:
            require_count(option(name), getattr(arguments, name))
    for name in ("shared_tokens", "seed"):
        if getattr(arguments, name) is not None:
            require_count(option(name), getattr(arguments, name), least=0)
    for name in ("input_median", "output_median", "rate", "max_ttft", "max_itl"):
        require_number(arguments, name, above=0)
    for name in ("input_sigma", "output_sigma"):
        require_number(arguments, name, above=-1e-9, most=10)
    drawn = (*sum(LENGTHS.values(), ()), "shared_tokens")
    given = [name for name in drawn if getattr(arguments, name) is not None]
    if trace is not None and given:
        raise InvalidRequestError(f"{option(given[0])} is for workloads that are drawn, not traces")
    if arguments.native_sequences is not None:
        for name in ("kv_memory", "num_blocks"):
            if getattr(arguments, name) is not None:
                raise InvalidRequestError(f"give --native-sequences or {option(name)}, not both")
    if arguments.kv_memory is not None:
        parse_memory(arguments.kv_memory, "--kv-memory")


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def require_number(
    arguments: argparse.Namespace, name: str, *, above: float, most: float = 1e9
) -> None:
    value = getattr(arguments, name, None)
    if value is not None and not above < value <= most:  # nor NaN
        least = "at least 0" if above < 0 else "above 0"
        raise InvalidRequestError(
            f"{option(name)} must be {least}, at most {most:g}, got {value:g}"
        )


def trace_of(arguments: argparse.Namespace) -> Path | None:
    path = Path(arguments.workload)
    return path if path.suffix == ".jsonl" else None


def shape_of(arguments: argparse.Namespace, longest: int) -> Shape:
    """The named shape, fitted to sequences of `longest`, with what is given in place of its own."""
    shape = fitted(SHAPES[arguments.workload], longest)
    lengths: dict[str, Lengths] = {}
    for what, names in LENGTHS.items():
        given = [getattr(arguments, name) for name in names]
        lengths[what] = with_limits(getattr(shape, what), *given)
    shared = shape.shared if arguments.shared_tokens is None else arguments.shared_tokens
    return replace(shape, **lengths, shared=shared)


def workload_of(
    arguments: argparse.Namespace, num_vocab: int, longest: int, encode: Encode | None
) -> tuple[str, Workload]:
    """What it is called, with its parameters, and its requests, which a model of this length can
    serve."""
    count, trace = arguments.requests, trace_of(arguments)
    if arguments.quick:
        count = count or QUICK_REQUESTS
    if trace is not None:
        needs_times = getattr(arguments, "rate", 1) is None
        # What is no UTF-8 becomes surrogates, which belong to a line that is refused by its number.
        with (
            explained("read", trace),
            trace.open(encoding="utf-8", errors="surrogateescape") as lines,
        ):
            workload = read_trace(
                lines,
                num_vocab,
                seed=arguments.seed,
                encode=encode,
                most=count,
                needs_times=needs_times,
            )
        name = f"trace {trace.name}"
    else:
        shape = shape_of(arguments, min(longest, QUICK_TOKENS) if arguments.quick else longest)
        workload = make_workload(shape, count or REQUESTS, num_vocab, arguments.seed)
        name = f"{arguments.workload}: {shape}; seed {arguments.seed}"
    check_lengths(workload, longest)
    return name, with_arrivals(arguments, workload)


def with_arrivals(arguments: argparse.Namespace, workload: Workload) -> Workload:
    """As they come in `paged-kv bench latency`; all at once where no option speaks of arrivals."""
    if not hasattr(arguments, "rate"):
        return all_at_once(workload)
    rate = arguments.rate
    if rate is None and trace_of(arguments) is None:
        rate = QUICK_RATE if arguments.quick else RATE
    return workload if rate is None else poisson_arrivals(workload, rate, arguments.seed)
