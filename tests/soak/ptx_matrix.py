"""Attention calls on an emulated GPU: every format with many shapes, rules and dtypes.

    make test-ptx        or, from the checkout:
    PYTHONPATH=bench:. TRITON_INTERPRET=0 python -m tests.soak.ptx_matrix --quick --json ptx.json

`tests/kernels/test_ptx.py` is a covering set of it. Outputs are held to the oracle in float64,
stored bytes to those of torch's kernels. What fails is printed, and makes the exit status 1. What
the same code has done before, by the JSON, is not done again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import torch
from report import Row, add_arguments, kept_rows, write_report

from tests.support.kv_formats import FORMATS_BY_LABEL
from tests.support.ptx.attention_case import (
    BF16,
    CAP_AND_WINDOW,
    CASES,
    FP16,
    FP32,
    SINK_LOGITS,
    STREAM,
    Case,
    run_case,
)
from tests.support.ptx.triton_emulation import emulated_gpu
from tests.support.triton_fleet import MIXED, PRESETS, TOKEN8_VALUES2

LABELED: Final = MIXED | FORMATS_BY_LABEL | PRESETS | {"token8-v2": TOKEN8_VALUES2}
FORMATS: Final = {kv_format: label for label, kv_format in LABELED.items()}
BASES: Final = [PRESETS[name] for name in ("native", "int8", "int4", "int2")]
HEAD_DIMS: Final = ((32, None), (40, 64), (80, None), (96, None), (192, 128), (256, None))
GROUPS: Final = (1, 3, 4, 8, 12, 16)
RULES: Final = (
    {"softcap": 3.0},
    {"sliding_window": 100},
    {"sliding_window": 1},
    {"attention_chunk": 64},
    {"sliding_window": 90, "attention_chunk": 256, "softcap": 5.0, "scale": 0.3},
    {"sink_logits": SINK_LOGITS},
    {"sink_logits": SINK_LOGITS, **CAP_AND_WINDOW},
)
ARCHITECTURES: Final = (80, 90)
QUICK: Final = 6  # cases
WRITTEN_EVERY: Final = 20  # cases
RIGHT: Final = "relative error"  # the metric of a case that does not fail


class Result(NamedTuple):
    arch: int
    case: Case
    error: float
    limit: float
    problem: str  # empty: none
    seconds: float

    @property
    def label(self) -> str:
        return label_of(self.arch, self.case)


def label_of(arch: int, case: Case) -> str:
    name = case.kv_format.name
    return f"sm{arch}-{FORMATS.get(case.kv_format, name)}{str(case).removeprefix(name)}"


def all_cases() -> Iterator[Case]:
    """One thing at a time beside what is usual, and every format with a few of each."""
    for kv_format in FORMATS:
        yield Case(kv_format)
        yield Case(kv_format, 64, 8, FP16, CAP_AND_WINDOW)
        yield Case(kv_format, 64, 1, FP32)
        if kv_format.is_native or kv_format.num_sink_tokens >= STREAM.num_sink_tokens:
            yield Case(kv_format, 64, 2, is_stream=True)
        yield Case(kv_format, 64, 2, is_apart=True)
    for kv_format in BASES:
        yield from (Case(kv_format, key, 2, value_dim=value) for key, value in HEAD_DIMS)
        yield from (Case(kv_format, 64, group, num_kv_heads=1) for group in GROUPS)
        yield from (Case(kv_format, 64, 4, rules=rules) for rules in RULES)
        yield from (Case(kv_format, 128, 4, dtype, is_stream=True) for dtype in (BF16, FP16))
        yield Case(kv_format, 128, 2, rules=CAP_AND_WINDOW)
        yield Case(kv_format, 128, 4, FP16, {"sink_logits": SINK_LOGITS}, is_apart=True)


def run(task: tuple[int, Case], folder: Path) -> Result:
    arch, case = task
    start, error, limit, problem = time.monotonic(), float("inf"), 0.0, ""
    try:
        with emulated_gpu(arch, folder):
            outcome = run_case(case)
        error, limit = outcome.error, outcome.limit
        if error > limit:
            problem = f"error {error:.1e} > {limit:.1e}"
        elif outcome.differing:
            problem = f"not as the reference: {', '.join(sorted(outcome.differing))}"
    except Exception as failure:
        problem = "".join(traceback.format_exception_only(failure)).strip()
    result = Result(arch, case, error, limit, problem, time.monotonic() - start)
    print(f"{result.label}: {problem or 'as it should be'}, {result.seconds:.0f} s", flush=True)
    return result


def row_of(result: Result) -> Row:
    return Row(
        case=result.label,
        metric=result.problem.partition("\n")[0] or RIGHT,
        value=result.error if result.error < float("inf") else -1.0,
        unit="",
        baseline="of its limit",
        baseline_value=result.limit,
        ratio=result.limit / result.error if 0 < result.error < float("inf") else None,
    )


def with_totals(rows: list[Row]) -> list[Row]:
    num_failed = sum(row.metric != RIGHT for row in rows)
    return [
        Row(case="all", metric="cases", value=len(rows), unit=""),
        Row(case="all", metric="cases that fail", value=num_failed, unit=""),
        *rows,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--processes", type=int, default=2, help="how many at a time (2)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for row in kept_rows(arguments.json) if row.metric == RIGHT]
    known = {row.case for row in rows}
    tasks = [(arch, case) for case in all_cases() for arch in ARCHITECTURES]
    if arguments.quick:
        tasks = CASES[:QUICK]
    tasks = [task for task in tasks if label_of(*task) not in known]
    with (
        TemporaryDirectory() as folder,
        multiprocessing.get_context("fork").Pool(arguments.processes) as pool,
    ):
        for number, result in enumerate(pool.imap(partial(run, folder=Path(folder)), tasks), 1):
            rows.append(row_of(result))
            if number % WRITTEN_EVERY == 0:
                write_report("ptx", with_totals(rows), arguments.json)
    write_report("ptx", with_totals(rows), arguments.json)
    return int(any(row.metric != RIGHT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
