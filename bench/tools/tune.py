"""Re-tunes the launches of decoding in `kernels/triton/launch.py`: tile, warps, pipeline stages.

    PYTHONPATH=bench python bench/tools/tune.py --json bench/results/tune.json

Candidates are what spills no register and fits shared memory on sm_80 and on sm_90. On a GPU each
is timed through the backend's own call, on layers of `bench_gpu_attention`; where there is none,
those with the fewest warp-instructions for each K/V byte in the loop over context on sm_90 are
best. The best of each key is printed as a line of its table, and written as soon as it is known;
the same command goes on with the next key, also behind one that failed. Chunks (more query rows)
are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from math import prod
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from bench_gpu_attention import Case, attend_of, make_layer, seconds_of
from report import Row, add_arguments, failure_row, kept_rows, write_report
from tools.kernel_launches import META, context_loop_density, recorded_kernels
from tools.machine_code import SHARED_MEMORY_LIMIT
from triton.runtime.errors import TritonError

from paged_kv.cache.backend import choose_backend
from paged_kv.kernels.triton import launch as triton_launch
from paged_kv.kernels.triton import plan as triton_plan
from paged_kv.kernels.triton.launch import WIDE, Launch, tile_rows

CUDA = torch.device("cuda")
# Of the fewest bits that are packed together: see `least_bits`.
FORMAT_OF_BITS = {8: "int8", 4: "k4v4", 2: "int2", 1: "int3", 0: "native"}
SHAPES = ((8, 8192), (64, 32768))  # sequences, tokens of context
LEAST_TILE, MOST_TOKENS = 16, 128  # a product has at least 16 rows, a block at most 128 tokens
NUM_WARPS, NUM_STAGES = (1, 2, 4, 8), (2, 3, 4)
H100_PROCESSORS = 132  # how contexts are split, where there is no GPU to ask
MAX_ERROR = 1e-2  # of a candidate's output, beside that of the present launch


class Key(NamedTuple):
    """Of an entry of a table, the first two; `head_dim` is narrow or wide."""

    bits: int
    rows: int
    head_dim: int

    @property
    def table_name(self) -> str:
        return "NARROW_LAUNCHES" if self.head_dim <= WIDE else "WIDE_LAUNCHES"

    @property
    def present(self) -> Launch:
        launch: Launch = getattr(triton_launch, self.table_name)[self.bits, self.rows]
        return launch

    def launching(self, launch: Launch) -> Any:
        """A context in which the table has this launch."""
        table = getattr(triton_launch, self.table_name)
        return patch.dict(table, {(self.bits, self.rows): launch})

    def case(self, batch: int, context: int) -> Case:
        return Case(FORMAT_OF_BITS[self.bits], batch, context, self.rows, self.head_dim)


KEYS = [
    Key(bits, rows, head_dim)
    for head_dim in (WIDE, 2 * WIDE)
    for bits in FORMAT_OF_BITS
    for rows in tile_rows(bits, head_dim, META).small
]


def candidates(key: Key) -> list[Launch]:
    """A larger tile than a block has rows of codes would be cut to these."""
    most = MOST_TOKENS * key.bits // 8 or MOST_TOKENS
    tiles = [LEAST_TILE << power for power in range((most // LEAST_TILE).bit_length())]
    return [
        Launch(tile, num_warps, num_stages)
        for tile in tiles
        for num_warps in NUM_WARPS
        for num_stages in NUM_STAGES
    ]


def instructions(
    key: Key,
    launch: Launch,
    shapes: Sequence[tuple[int, int]] = SHAPES[:1],
    processors: int = H100_PROCESSORS,
) -> float | None:
    """Of a warp for each K/V byte on sm_90; None for what spills or does not fit somewhere.

    Compiles what a GPU with so many processors runs on these shapes: it finds that on disk.
    """
    name = "attend_sealed" if key.bits else "attend_open"
    density = None
    for batch, context in shapes:
        case = key.case(batch, context)
        with (
            patch.object(triton_plan, "num_processors", lambda device: processors),
            key.launching(launch),
            recorded_kernels() as recorded,
        ):
            attend_of(case, make_layer(case, META), choose_backend(CUDA, "triton"))()
        (kernel,) = (each for each in recorded if each.name == name)
        for arch in sorted(SHARED_MEMORY_LIMIT):
            try:
                taken = kernel.resources(arch)
            except (TritonError, RuntimeError):
                return None
            if taken.local_bytes or not taken.fits_shared_memory:
                return None
        density = context_loop_density(kernel, kernel.machine_code(90))
    return density


def fitting(futures: Mapping[Launch, Future[float | None]]) -> dict[Launch, list[float]]:
    """Instructions of each candidate that has them, fewest first."""
    densities = {launch: future.result() for launch, future in futures.items()}
    found = {launch: [density] for launch, density in densities.items() if density is not None}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def time_on_gpu(key: Key, launches: Collection[Launch]) -> dict[Launch, list[float]]:
    """Microseconds on each shape of those that run, and are right, on all that fit memory."""
    times: dict[Launch, list[float]] = {launch: [] for launch in (key.present, *launches)}
    for shape in SHAPES:
        case = key.case(*shape)
        try:
            attend = attend_of(case, make_layer(case), choose_backend(CUDA, "triton"))
            expected = attend().float()
        except torch.OutOfMemoryError:
            print(f"{case.name}: not enough memory", flush=True)
            continue
        for launch in list(times):
            try:
                with key.launching(launch):
                    error = (attend().float() - expected).norm() / expected.norm()
                    assert error < MAX_ERROR, f"wrong by {error:.1e}"
                    times[launch].append(seconds_of(attend) * 1e6)
            except (TritonError, RuntimeError, AssertionError) as problem:
                print(f"{launch} of {key}, {case.name}: {problem}", flush=True)
                del times[launch]
    return times


def case_name(key: Key, shape: tuple[int, int]) -> str:
    return f"{key.case(*shape).name}, D={key.head_dim}"


def unmeasured(keys: Collection[Key], rows: Collection[Row]) -> list[Key]:
    known = {row.case for row in rows}
    return [key for key in keys if not any(case_name(key, shape) in known for shape in SHAPES)]


def rows_of_best(
    key: Key, figures: Mapping[Launch, list[float]], metric: str, unit: str
) -> list[Row]:
    """One row a shape; the best launch is printed as its table wants it."""
    best = min(figures, key=lambda launch: (prod(figures[launch]), launch != key.present))
    present = figures.get(key.present)  # none: it does not fit
    entry = f"({key.bits}, {key.rows}): Launch{tuple(best)},"
    print(f"    {entry}  # {key.table_name} had Launch{tuple(key.present)}", flush=True)
    return [
        Row(
            case=case_name(key, shape),
            metric=metric,
            value=value,
            unit=unit,
            baseline=None if present is None else "the table's launch",
            baseline_value=None if present is None else present[index],
            ratio=None if present is None else present[index] / value,
        )
        for index, (shape, value) in enumerate(zip(SHAPES, figures[best], strict=False))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    # What is compiled here beforehand, by all cores, is what the GPU will find on disk.
    shapes = SHAPES if has_gpu else SHAPES[:1]
    processors = triton_plan.num_processors(CUDA) if has_gpu else H100_PROCESSORS
    rows = kept_rows(arguments.json)
    keys = unmeasured(KEYS[:1] if arguments.quick else KEYS, rows)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        compiled = {
            key: {
                launch: pool.submit(instructions, key, launch, shapes, processors)
                for launch in candidates(key)
            }
            for key in keys
        }
        for key, futures in compiled.items():
            try:
                figures, metric, unit = fitting(futures), "warp-instructions", "/KV byte"
                if has_gpu:
                    figures, metric, unit = time_on_gpu(key, figures), "decode us", "us"
                rows += rows_of_best(key, figures, metric, unit)
            except Exception as error:
                rows.append(failure_row(case_name(key, SHAPES[0]), error))
                write_report("tune", rows, arguments.json)
                pool.shutdown(wait=False, cancel_futures=True)
                raise  # a GPU that has failed does nothing more for this process
            write_report("tune", rows, arguments.json)  # as far as it got


if __name__ == "__main__":
    main()
