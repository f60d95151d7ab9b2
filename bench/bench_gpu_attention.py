"""Decode attention of Triton's kernels over scattered blocks on a GPU, beside what memory can do.

    python bench/bench_gpu_attention.py --json bench/results/attention_gpu.json

Each case is one layer of `batch x context` with 8 kv heads of 128 channels: bf16 queries, one new
token a sequence, block ids shuffled. The call is captured in a graph, and replayed with a cold
second cache; the median counts. Baselines: what a large copy moves (reads and writes counted), over
the bytes that the case has to read, metadata included; and those of peers/gpu_attention.py, timed
in the same way on K/V of the same shape, once each of them has given what SDPA gives. The row of a
peer that cannot run says why. A case is written as soon as it is measured, and the same command
goes on behind it, or behind the one that failed, if code and device are the same. --copy measures
copies alone, of several sizes.

On a CPU with TRITON_INTERPRET=1 only --quick makes sense: it shows that all of it runs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from traceback import format_exception_only

import numpy as np
import torch
from peers.gpu_attention import CONTIGUOUS, PEERS, Contents, Peer, relative_error
from report import Row, add_arguments, failure_row, kept_rows, write_report
from torch import Tensor

from paged_kv.cache.backend import Backend, choose_backend
from paged_kv.cache.formats import FORMATS, INT4
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.kernels.block_views import LayerBlocks
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules
from paged_kv.kernels.step_inputs import StepInputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_HEADS, HEAD_DIM = 8, 128
# The last shows kernels of 4 bits alone: those of the preset have upper bits of wide channels too.
KNOWN_FORMATS = FORMATS | {"k4v4": INT4.with_options(name="k4v4", wide_key_share=0.0)}
PEER_BYTES = 16 << 30  # contiguous K/V beyond which peers are left out
MAX_PEER_ERROR = 0.02  # relative to SDPA, in bf16
COPY_BYTES = 4 << 30


@dataclass(frozen=True)
class Case:
    kv_format: str
    batch: int
    context: int
    group_size: int
    head_dim: int = HEAD_DIM

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

    blocks: LayerBlocks
    step: StepInputs
    num_bytes: int  # that the step has to read


def make_layer(case: Case, device: torch.device = DEVICE) -> Layer:
    """Contexts of random codes: their numbers do not matter, their scales are sane."""
    layer = LayerSpec(
        kv_format=KNOWN_FORMATS[case.kv_format],
        num_kv_heads=NUM_HEADS,
        key_dim=case.head_dim,
        value_dim=case.head_dim,
    )
    layout = layer.record_layout(torch.bfloat16)
    geometry = cache_geometry([layer], torch.bfloat16)
    num_blocks = geometry.max_blocks(case.context) * case.batch
    cache = PagedKVCache([layer], num_blocks=num_blocks, dtype=torch.bfloat16, device=device)
    blocks = cache.records[0]
    cache.arenas[0].random_(0, 256)
    num_sealed = 0
    if not layer.kv_format.is_native:
        behind_head = case.context - geometry.num_head_tokens - geometry.min_tail_tokens
        num_sealed = behind_head // geometry.block_size
    num_open_tokens = case.context - num_sealed * geometry.block_size
    num_open = -(-num_open_tokens // geometry.open_block_size)
    ids = torch.randperm(num_blocks, device=device)
    open_ids = ids[: case.batch * num_open].view(case.batch, num_open)
    sealed_ids = ids[case.batch * num_open :][: case.batch * num_sealed]
    places_of_block, num_head = geometry.open_blocks_per_block, geometry.num_head_blocks
    width = num_open + num_sealed * places_of_block
    block_table = torch.zeros(case.batch, width, dtype=torch.int64, device=device)
    block_table[:, :num_head] = open_ids[:, :num_head]
    block_table[:, width - num_open + num_head :] = open_ids[:, num_head:]
    places = num_head + torch.arange(num_sealed, device=device) * places_of_block
    block_table[:, places] = sealed_ids.view(case.batch, num_sealed)
    # Open blocks after sealed ones: metadata of the one must not be tokens of the other.
    for section in () if blocks.sealed is None else blocks.sealed:
        if section is not None and section.dtype is torch.float16:
            section.fill_(0.01)
    for view in (blocks.open_keys, blocks.open_values):
        for part in open_ids.flatten().split(4096):
            view[part] = torch.randn(
                len(part), *view.shape[1:], dtype=torch.bfloat16, device=device
            )

    def longs(value: int) -> Tensor:
        return torch.full((case.batch,), value, dtype=torch.int64, device=device)

    none = torch.zeros(0, dtype=torch.int64, device=device)
    step = StepInputs(
        query_lens=np.ones(case.batch, dtype=np.int64),
        context_lens_host=np.full(case.batch, case.context),
        context_lens=longs(case.context),
        query_start_loc=torch.arange(case.batch + 1, device=device),
        cache_positions=longs(case.context),
        block_table=block_table,
        num_sealed=longs(num_sealed),
        stored_tokens=none,
        stored_slots=none,
        seal_block_ids=none,
        seal_sources=none.view(0, geometry.block_size),
        block_size=geometry.block_size,
        open_block_size=geometry.open_block_size,
        num_head_tokens=geometry.num_head_tokens,
    )
    sealed_bytes = 0 if blocks.sealed is None else sum(layout.section_bytes.values())
    per_head = num_sealed * sealed_bytes + num_open_tokens * layout.token_bytes
    return Layer(blocks, step, case.batch * NUM_HEADS * per_head)


def attend_of(case: Case, layer: Layer, backend: Backend) -> Callable[[], Tensor]:
    """The call that is timed: the layer's attention for one new token of each sequence."""
    heads, device = NUM_HEADS * case.group_size, layer.step.device
    query = torch.randn(case.batch, heads, case.head_dim, dtype=torch.bfloat16, device=device)
    new = torch.randn(case.batch, NUM_HEADS, case.head_dim, dtype=torch.bfloat16, device=device)
    plan = backend.plan(layer.step)
    tokens, rules = NewTokens(query, new, new), ScoreRules(case.head_dim**-0.5)
    return lambda: backend.attend(tokens, layer.blocks, plan, rules)


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


@cache
def peer_timings(batch: int, context: int, group_size: int) -> dict[str, float | str]:
    """Each peer's seconds, or why there are none: the same for all formats of ours."""
    shape = batch, NUM_HEADS, context, HEAD_DIM
    if 4 * math.prod(shape) > PEER_BYTES:
        return {peer.name: "left out: too large" for peer in PEERS}
    contents = Contents.random(shape, group_size, DEVICE)
    exact = CONTIGUOUS.prepare(contents)()
    print(f"{batch}x{context}, {group_size} queries a head", flush=True)
    return {peer.name: peer_timing(peer, contents, exact) for peer in PEERS}


def peer_timing(peer: Peer, contents: Contents, exact: Tensor) -> float | str:
    """Its seconds; or its exception, whatever that is: others have to be measured too."""
    try:
        decode = peer.prepare(contents)
        error = relative_error(decode(), exact)
        print(f"  {peer.name}: relative error {error:.5f}", flush=True)
        if not error < MAX_PEER_ERROR:
            return f"relative error {error:.5f}"
        return seconds_of(decode)
    except Exception as failure:
        reason = format_exception_only(failure)[0].splitlines()[0]
        print(f"  {peer.name}: {reason}", flush=True)
        return reason


def peer_row(case: Case, seconds: float, name: str, timing: float | str) -> Row:
    """Our microseconds beside a peer's, or beside the reason why it has none."""
    ours = Row(case=case.name, metric="decode us", value=seconds * 1e6, unit="us")
    if isinstance(timing, str):
        return replace(ours, baseline=f"{name} ({timing})")
    return replace(ours, baseline=name, baseline_value=timing * 1e6, ratio=timing / seconds)


@cache
def our_timing(case: Case) -> tuple[float, int]:
    """Our seconds, and the bytes that have to be read."""
    layer = make_layer(case)
    attend = attend_of(case, layer, choose_backend(DEVICE, "triton"))
    assert torch.isfinite(attend()).all()
    return seconds_of(attend), layer.num_bytes


def rows_of(case: Case, copied: float) -> list[Row]:
    timings = peer_timings(case.batch, case.context, case.group_size)  # before ours takes memory
    seconds, num_bytes = our_timing(case)
    moved = num_bytes / seconds
    if case.kv_format != "native":
        native, _ = our_timing(replace(case, kv_format="native"))
        timings = {"our native kernel": native} | timings
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
    return rows + [peer_row(case, seconds, name, timing) for name, timing in timings.items()]


def copy_row(case: str, num_bytes: int) -> Row:
    copied = copy_bandwidth(num_bytes)
    return Row(case=case, metric="bytes read and written", value=copied / 1e9, unit="GB/s")


def run_copies(quick: bool, json_file: Path | None) -> None:
    sizes = [1 << 22, 1 << 24] if quick else [1 << 24, 1 << 26, 1 << 28, 1 << 30, COPY_BYTES]
    rows = [copy_row(f"copy of {size >> 20} MiB", size) for size in sizes]
    write_report("copies on a GPU", rows, json_file)


def run(quick: bool, json_file: Path | None) -> None:
    """Rows of an earlier start stay; what a copy moves is measured anew, for those to come."""
    ceiling = copy_row("copy", 1 << 24 if quick else COPY_BYTES)
    copied = ceiling.value * 1e9
    rows = [ceiling, *(row for row in kept_rows(json_file) if row.case != ceiling.case)]
    known = {row.case for row in rows}
    for case in QUICK_CASES if quick else CASES:
        if case.name in known:
            continue
        try:
            rows += rows_of(case, copied)
        except torch.OutOfMemoryError:
            print(f"{case.name}: not enough memory", flush=True)
        except Exception as error:
            write_report("attention on a GPU", [*rows, failure_row(case.name, error)], json_file)
            raise  # a GPU that has failed does nothing more for this process
        write_report("attention on a GPU", rows, json_file)  # as far as it got


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copy", action="store_true", help="copies alone")
    add_arguments(parser)
    arguments = parser.parse_args()
    (run_copies if arguments.copy else run)(arguments.quick, arguments.json)


if __name__ == "__main__":
    main()
