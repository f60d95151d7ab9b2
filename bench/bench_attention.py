"""Attention over paged, quantized blocks beside attention over contiguous fp32 K/V, in turn.

    python bench/bench_attention.py --threads 2 --json bench/results/attention_cpu.json

A decode case is `batch x context, query heads / kv heads, head_dim`: each sequence's last token
attends to itself and to all before it. Only `attend` on a prepared step is timed, for `seal` only
`store_tokens`, and for `append` what `attend_and_store` takes longer than `attend`; queries and new
K/V are float32. Block ids are shuffled, so that the blocks of a sequence lie anywhere in the arena.
Each sample takes the next layer, as a model does, and the other sides take their turns in between:
nobody finds their K/V in the processor's caches, but for `call`, a decode so small that only the
cost of calling is left.

The baselines have the same contents, and take turns with ours in one process:

- contiguous fp32 SDPA: torch's attention over [batch, kv heads, longest, head_dim], padded. Heads
  folded into query rows, `enable_gqa` and expanded K/V, boolean and additive masks are tried for
  each case; the fastest is the baseline, and its name is in the row.
- per-sequence SDPA: one call a sequence on K/V of exactly its length, heads folded.
- torch backend: the library's own fallback, on a cache with the same blocks.
- random 16 KB reads: how fast the threads read pieces at random places of 512 MB. Beside it stands
  what a decode has to read (codes, metadata, open tokens) over its time.
- contiguous fp32 copy, for `append`: the same tokens written into the contiguous K/V.

A sample counts if the system took no core from this process meanwhile (in long calls, at most one
each 10 ms), and if other processes used at most 4 % of the cores in its round of 0.3 s. Where too
few count within `--patience` seconds, the fastest third of all is taken, and the case of the row
ends in `(disturbed)`. All sides run on torch's threads: those of a second pool would fight them.

Errors are relative to attention in float64 over what the cache holds, dequantized in float64.
"""

from __future__ import annotations

import argparse
import os
from itertools import cycle
from typing import Any

import bench_gpu_attention
import numba
import numpy as np
import torch
from report import add_arguments, write_report

from paged_kv.benchmarks.attention import READ_BYTES, Bench, chosen
from paged_kv.benchmarks.attention_cases import CASES, QUICK_CASES
from paged_kv.benchmarks.paged_cases import FORMATS
from paged_kv.benchmarks.turns import OfLayer, Sampling
from paged_kv.errors import ConfigError
from paged_kv.kernels.cpu.native_code import address_of, fetch_add, load_long, store_long
from paged_kv.kernels.cpu.threads import run_worker

PIECE_WORDS = (16 << 10) // 8
BUFFER_BYTES = 1 << 29


@numba.cfunc(numba.void(numba.types.voidptr))
def read_pieces(parameters: Any) -> None:
    """Draws groups of eight pieces, and adds up all words of a group: a sum for each.

    The eight are read in step: one alone would wait for its next page again and again.
    """
    address = address_of(parameters)
    counter, groups, num_groups, sums = (
        load_long(address, 0),
        load_long(address, 1),
        load_long(address, 2),
        load_long(address, 3),
    )
    index = fetch_add(counter)
    while index < num_groups:
        a, b = load_long(groups, 8 * index), load_long(groups, 8 * index + 1)
        c, d = load_long(groups, 8 * index + 2), load_long(groups, 8 * index + 3)
        e, f = load_long(groups, 8 * index + 4), load_long(groups, 8 * index + 5)
        g, h = load_long(groups, 8 * index + 6), load_long(groups, 8 * index + 7)
        total = 0
        for word in range(PIECE_WORDS):
            total += load_long(a, word) + load_long(b, word) + load_long(c, word)
            total += load_long(d, word) + load_long(e, word) + load_long(f, word)
            total += load_long(g, word) + load_long(h, word)
        store_long(sums, index, total)
        index = fetch_add(counter)


def random_reads(num_threads: int) -> OfLayer:
    """Reads the next `READ_BYTES` of a buffer, in pieces at random places, on torch's threads."""
    words = np.ones(BUFFER_BYTES // 8, dtype=np.int64)
    starts = np.random.default_rng(2).permutation(len(words) // PIECE_WORDS) * PIECE_WORDS
    groups = (words.ctypes.data + 8 * starts).reshape(-1, 8)
    parts = cycle(np.split(groups, BUFFER_BYTES // READ_BYTES))
    counter, sums = np.zeros(1, dtype=np.int64), np.zeros(len(groups), dtype=np.int64)
    worker = read_pieces.address
    assert worker is not None

    def read_next(layer: int) -> None:
        part = next(parts)
        counter[0] = 0
        addresses = [counter.ctypes.data, part.ctypes.data, len(part), sums.ctypes.data]
        parameters = np.array(addresses, dtype=np.int64)
        run_worker(worker, int(parameters.ctypes.data), num_threads)
        assert sums[: len(part)].sum() == READ_BYTES // words.itemsize

    return read_next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda runs bench_gpu_attention.py instead, which knows --quick and --json only",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--formats", nargs="+", help="parts of their names, such as native int8")
    parser.add_argument("--cases", nargs="+", help="parts of their names, such as 16x2048 ragged")
    parser.add_argument("--patience", type=float, help="seconds to wait for undisturbed samples")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        bench_gpu_attention.run(arguments.quick, arguments.json)
        return
    cases = QUICK_CASES if arguments.quick else CASES
    try:
        names = chosen("--cases", cases, arguments.cases)
        labels = chosen("--formats", FORMATS, arguments.formats)
    except ConfigError as error:
        parser.error(str(error))
    num_wanted, patience = (3, 0.5) if arguments.quick else (15, 30.0)
    torch.set_num_threads(arguments.threads)
    bench = Bench(
        labels=labels,
        sampling=Sampling(num_wanted, arguments.patience or patience),
        read_next=random_reads(arguments.threads),
    )
    rows = [row for name in names for row in bench.rows(name, cases[name])]
    write_report("attention", rows, arguments.json)


if __name__ == "__main__":
    main()
