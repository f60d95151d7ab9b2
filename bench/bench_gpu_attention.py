"""Decode attention of Triton's kernels over scattered blocks on a GPU, beside what memory can do.

    python bench/bench_gpu_attention.py --json bench/results/attention_gpu.json

Each case is one layer of `batch x context` with 8 kv heads of 128 channels: bf16 queries, one new
token a sequence, block ids shuffled. The call is captured in a graph, and replayed with a cold
second cache; the median counts. Baselines: what a large copy moves (reads and writes counted), over
the bytes that the case has to read, metadata included; and, where it fits, torch's SDPA on
contiguous bf16 K/V.

On a CPU with TRITON_INTERPRET=1 only --quick makes sense: it shows that all of it runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from report import Row, add_arguments, write_report
from torch import Tensor
from torch.nn import functional

from paged_kv.backend import choose_backend
from paged_kv.cache import LayerSpec, PagedKVCache, cache_geometry
from paged_kv.formats import FORMATS
from paged_kv.kernels.records import LayerRecords, StepIndices

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_HEADS, HEAD_DIM = 8, 128
SDPA_BYTES = 16 << 30  # contiguous K/V beyond which it is left out
COPY_BYTES = 4 << 30


@dataclass(frozen=True)
class Case:
    kv_format: str
    batch: int
    context: int
    group_size: int

    @property
    def name(self) -> str:
        return f"{self.kv_format} {self.batch}x{self.context}, {self.group_size} queries a head"


SHAPES = [(64, 32768), (32, 8192), (8, 32768), (1, 131072)]
CASES = [
    Case(kv_format, batch, context, group_size)
    for batch, context in SHAPES
    for kv_format in ("native", "int8", "int4", "int2")
    for group_size in (4, 8)
]
QUICK_CASES = [Case(kv_format, 2, 400, 4) for kv_format in ("native", "int8", "int4", "int2")]


@dataclass(frozen=True)
class Layer:
    """A layer's records with contexts in them, and the step that is timed."""

    records: LayerRecords
    step: StepIndices
    num_bytes: int  # that the step has to read


def make_layer(case: Case) -> Layer:
    """Contexts of random codes: their numbers do not matter, their scales are sane."""
    layer = LayerSpec(
        kv_format=FORMATS[case.kv_format],
        num_kv_heads=NUM_HEADS,
        key_dim=HEAD_DIM,
        value_dim=HEAD_DIM,
    )
    layout = layer.record_layout(torch.bfloat16)
    geometry = cache_geometry([layer], torch.bfloat16)
    num_blocks = geometry.max_blocks(case.context) * case.batch
    cache = PagedKVCache([layer], num_blocks=num_blocks, dtype=torch.bfloat16, device=DEVICE)
    records = cache.records[0]
    cache.arenas[0].random_(0, 256)
    num_sealed = 0
    if not layer.kv_format.is_native:
        behind_head = case.context - geometry.num_head_tokens - geometry.min_tail_tokens
        num_sealed = behind_head // geometry.block_size
    num_open_tokens = case.context - num_sealed * geometry.block_size
    num_open = -(-num_open_tokens // geometry.open_block_size)
    ids = torch.randperm(num_blocks, device=DEVICE)
    open_ids = ids[: case.batch * num_open].view(case.batch, num_open)
    sealed_ids = ids[case.batch * num_open :][: case.batch * num_sealed]
    # Open blocks after sealed ones: metadata of the one must not be tokens of the other.
    for section in () if records.sealed is None else records.sealed[2:]:
        if section is not None:
            section.fill_(0.01)
    for blocks in (records.open_keys, records.open_values):
        for part in open_ids.flatten().split(4096):
            blocks[part] = torch.randn(
                len(part), *blocks.shape[1:], dtype=torch.bfloat16, device=DEVICE
            )

    def longs(value: int) -> Tensor:
        return torch.full((case.batch,), value, dtype=torch.int64, device=DEVICE)

    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    step = StepIndices(
        query_lens=(1,) * case.batch,
        context_lens_host=(case.context,) * case.batch,
        context_lens=longs(case.context),
        query_start_loc=torch.arange(case.batch + 1, device=DEVICE),
        positions=longs(case.context),
        open_table=open_ids,
        sealed_table=sealed_ids.view(case.batch, num_sealed),
        num_sealed=longs(num_sealed),
        stored_tokens=none,
        stored_slots=none,
        seal_block_ids=none,
        seal_sources=none.view(0, geometry.block_size),
        block_size=geometry.block_size,
        open_block_size=geometry.open_block_size,
        num_head_tokens=geometry.num_head_tokens,
    )
    sealed_bytes = 0 if records.sealed is None else sum(layout.section_bytes.values())
    per_head = num_sealed * sealed_bytes + num_open_tokens * layout.token_bytes
    return Layer(records, step, case.batch * NUM_HEADS * per_head)


def seconds_of(function: Callable[[], object]) -> float:
    """The median, replayed from a graph with a cold second cache; on a CPU, of three calls."""
    if DEVICE.type == "cpu":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return median(times)
    from triton.testing import do_bench

    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return float(do_bench(graph.replay, warmup=50, rep=200, return_mode="median")) / 1e3


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(num_bytes // 8, dtype=torch.float64, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source))


def contiguous_seconds(case: Case, query: Tensor) -> float | None:
    """torch's SDPA on contiguous bf16 K/V of the same sizes, query heads as rows of a kv head."""
    shape = (case.batch, NUM_HEADS, case.context, HEAD_DIM)
    if 4 * case.batch * NUM_HEADS * case.context * HEAD_DIM > SDPA_BYTES:
        return None
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    rows = query.view(case.batch, NUM_HEADS, case.group_size, HEAD_DIM)
    return seconds_of(lambda: functional.scaled_dot_product_attention(rows, keys, values))


def rows_of(case: Case, copied: float) -> list[Row]:
    layer = make_layer(case)
    backend = choose_backend(DEVICE, "triton")
    plan = backend.plan(layer.step)
    heads = NUM_HEADS * case.group_size
    query = torch.randn(case.batch, heads, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    new = torch.randn(case.batch, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)

    def attend() -> Tensor:
        return backend.attend(query, new, new, layer.records, plan, scale=HEAD_DIM**-0.5)

    assert torch.isfinite(attend()).all()
    seconds = seconds_of(attend)
    moved = layer.num_bytes / seconds
    rows = [
        Row(
            case=case.name,
            metric="needed bytes read",
            value=moved / 1e9,
            unit="GB/s",
            baseline="copy",
            baseline_value=copied / 1e9,
            ratio=moved / copied,
        )
    ]
    contiguous = contiguous_seconds(case, query)
    rows.append(
        Row(
            case=case.name,
            metric="decode us",
            value=seconds * 1e6,
            unit="us",
            baseline=None if contiguous is None else "contiguous bf16 SDPA",
            baseline_value=None if contiguous is None else contiguous * 1e6,
            ratio=None if contiguous is None else contiguous / seconds,
        )
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    copied = copy_bandwidth(1 << 24 if arguments.quick else COPY_BYTES)
    rows = [Row(case="copy", metric="bytes read and written", value=copied / 1e9, unit="GB/s")]
    for case in QUICK_CASES if arguments.quick else CASES:
        try:
            rows += rows_of(case, copied)
        except torch.OutOfMemoryError:
            print(f"{case.name}: not enough memory", flush=True)
        write_report("attention on a GPU", rows, arguments.json)  # as far as it got


if __name__ == "__main__":
    main()
