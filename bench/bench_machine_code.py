"""What the compiler makes of every Triton kernel that a preset launches, without a GPU.

    TRITON_INTERPRET=0 python bench/bench_machine_code.py --json bench/results/machine_code.json

One layer with 8 kv heads is attended to and stored as on a GPU of each architecture, by few query
rows of a kv head (4), more (16) and many (512; the last two with 128 channels alone). Registers of
a thread, shared memory of a CTA and spilled bytes of a thread, and, where there is a loop over
context, warp-instructions for each K/V byte. A kernel that several of these launch is told once,
where it is first launched.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple

from report import Row, add_arguments, write_report
from tools.kernel_launches import Launch, context_loop_density, record_launches
from tools.machine_code import SHARED_MEMORY_LIMIT, disassemble

from paged_kv.cache.formats import FORMATS

ROWS = {"few": (4, 1), "more": (8, 2), "many": (8, 64)}  # query heads of a kv head, new tokens
HEAD_DIMS = (64, 128, 256)
PROCESSES = 2


class Case(NamedTuple):
    arch: int
    head_dim: int
    kv_format: str
    rows: str

    def launches(self) -> list[Launch]:
        group_size, num_new = ROWS[self.rows]
        return record_launches(
            FORMATS[self.kv_format],
            head_dim=self.head_dim,
            group_size=group_size,
            query_lens=(num_new,),
            arch=self.arch,
        )


def measure(case: Case) -> list[tuple[str, list[Row]]]:
    """Rows of each kernel, with what identifies its code."""
    return [measure_launch(case, launch) for launch in case.launches()]


def measure_launch(case: Case, launch: Launch) -> tuple[str, list[Row]]:
    compiled = launch.compile(case.arch)
    code = disassemble(compiled)
    figures = [
        ("registers", code.registers, ""),
        ("shared memory", code.shared_bytes, "B"),
        ("spilled", code.local_bytes, "B"),
    ]
    if launch.name in ("attend_sealed", "attend_open", "attend_prefill"):
        density = context_loop_density(launch, code)
        figures.append(("warp-instructions", density, "/KV byte"))
    name = f"{launch.name}, sm_{case.arch}, D={case.head_dim}, {case.kv_format}, {case.rows} rows"
    return compiled.hash, [
        Row(case=name, metric=metric, value=value, unit=unit) for metric, value, unit in figures
    ]


def cases(*, is_quick: bool) -> Iterator[Case]:
    if is_quick:
        yield Case(90, 64, "int8", "few")
        return
    for case in map(Case._make, product(sorted(SHARED_MEMORY_LIMIT), HEAD_DIMS, FORMATS, ROWS)):
        if case.head_dim == 128 or case.rows == "few":
            yield case


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    rows: dict[str, list[Row]] = {}
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for measured in pool.map(measure, cases(is_quick=arguments.quick)):
            for code, figures in measured:
                rows.setdefault(code, figures)
    write_report("machine code", [row for each in rows.values() for row in each], arguments.json)


if __name__ == "__main__":
    main()
