"""The CPU's own kernels: vector widths, threads, stored bytes, error bounds, code kept on disk.

`test_attention` runs its whole suite on them too; here is what only they can get wrong.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from paged_kv.cache.attention import paged_attention
from paged_kv.cache.block_views import layer_blocks
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, KVFormat
from paged_kv.cache.layer_spec import LayerSpec
from paged_kv.kernels.block_views import LayerBlocks
from paged_kv.kernels.cpu import attention as cpu_attention
from paged_kv.kernels.cpu import microkernels as cpu_microkernels
from paged_kv.kernels.cpu import native_attention as cpu_worker
from paged_kv.kernels.cpu import native_code as cpu_native
from paged_kv.kernels.cpu import plan as cpu_plan
from paged_kv.kernels.cpu import quantize as cpu_quantize
from paged_kv.kernels.cpu import store as cpu_store
from paged_kv.kernels.cpu import threads as cpu_threads
from paged_kv.kernels.cpu import vectors as cpu_vectors
from paged_kv.kernels.cpu.microkernels import TILE_TOKENS
from paged_kv.kernels.cpu.native_attention import MAX_ITEM_ROWS, Item
from paged_kv.kernels.cpu.plan import WorkItems, plan_items
from paged_kv.kernels.eager import store
from paged_kv.kernels.step_inputs import StepInputs
from tests.support import attention_oracle, helpers
from tests.support.attention_oracle import (
    FLOAT32_TOLERANCE,
    expected_outputs,
    layer_of,
    ragged_fleet,
    relative_error,
    tolerance,
)
from tests.support.helpers import (
    FORMATS_BY_LABEL,
    NAN_BYTE,
    Fleet,
    in_float32_only,
    make_stream,
    step_of,
    tokens_of_every_kind,
)

ROOT = Path(__file__).parents[2]
ALL_FORMATS = pytest.mark.parametrize("kv_format", FORMATS_BY_LABEL.values(), ids=FORMATS_BY_LABEL)
BASE_FORMATS = pytest.mark.parametrize(
    "kv_format", [NATIVE, INT8, INT4, INT2], ids=lambda kv_format: kv_format.name
)
LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
SINKS = torch.tensor([-1.0, 0.5, 3.0, 20.0])


def limit_of(kv_format: KVFormat) -> float:
    """Relative error that the kernels' float32 may add."""
    return 1e-4 if kv_format.is_asymmetric else FLOAT32_TOLERANCE


def check_step(
    fleet: Fleet, counts: dict[int, int], *, dtype: torch.dtype = torch.float32, **options: object
) -> None:
    """Hold a step to the oracle; `dtype` is that of the output."""
    limit = max(limit_of(layer.kv_format) for layer in fleet.cache.layers)
    limit += tolerance(dtype) - FLOAT32_TOLERANCE
    attention_oracle.check_step(fleet, counts, limit=limit, **options)


@pytest.fixture(autouse=True)
def on_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGED_KV_BACKEND", "cpu")


# -- vector widths ------------------------------------------------------------------------------


@cache
def kernels_of_their_own(lanes: int) -> dict[tuple[Any, str], Callable[..., Any]]:
    """The makers of kernels, each with a cache that serves one width only."""
    return {
        (module, name): cache(function.__wrapped__)
        for module in (cpu_attention, cpu_store)
        for name, function in vars(module).items()
        if name.endswith("_kernel")
    }


@pytest.fixture(params=[16, 8, 4], ids=lambda lanes: f"{lanes}-lanes")
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels are made for vectors of so many lanes, whatever this machine has.

    Some are kept without the width in their key. Caches are replaced, never cleared: layers of
    other tests may hold the addresses of what is in them.
    """
    for module in (cpu_attention, cpu_microkernels, cpu_quantize):
        monkeypatch.setattr(module, "host_width", lambda: request.param)
    for (module, name), function in kernels_of_their_own(request.param).items():
        monkeypatch.setattr(module, name, function)
    return request.param


@pytest.mark.parametrize("head_dim", [40, 128])
@ALL_FORMATS
def test_every_vector_width_matches_the_oracle(kv_format, head_dim, lanes):
    for kv_heads, gqa_group in ((2, 1), (1, 3), (2, 8), (1, 16)):
        layer = layer_of(kv_format, heads=kv_heads, key_dim=head_dim)
        fleet, slots = ragged_fleet(layer, (1, 63, 333), gqa_group=gqa_group)
        check_step(fleet, dict.fromkeys(slots, 1))
        check_step(fleet, dict.fromkeys(slots, 3), softcap=3.0)


@BASE_FORMATS
def test_every_vector_width_serves_keys_and_values_of_other_sizes(kv_format, lanes):
    for key_dim, value_dim in ((8, 256), (24, 8), (64, 96)):
        layer = layer_of(kv_format, key_dim=key_dim, value_dim=value_dim)
        fleet, slots = ragged_fleet(layer, (1, 333))
        check_step(fleet, dict.fromkeys(slots, 1))
        check_step(fleet, dict.fromkeys(slots, 7))


@pytest.mark.parametrize("gqa_group", [33, 71])
@BASE_FORMATS
def test_more_query_heads_than_an_item_has_rows(kv_format, gqa_group):
    fleet, slots = ragged_fleet(layer_of(kv_format, heads=1), (0, 1, 300), gqa_group=gqa_group)
    for num_new in (1, 3):
        check_step(fleet, dict.fromkeys(slots, num_new))


@pytest.mark.parametrize("block_size", [1, 2, 64, 256])
def test_native_blocks_of_any_size(block_size):
    """Of 1 token: vectors of one lane; of 256: more than the tokens whose scores are kept."""
    layer = layer_of(NATIVE.with_options(block_size=block_size))
    fleet = Fleet([layer], num_blocks=1200)
    slot = fleet.add(make_stream([layer], 1100, 1, torch.float32, gqa_group=2))
    for count in (5, 1, 150, 300, 1, 400, 1):
        check_step(fleet, {slot: count})


@BASE_FORMATS
def test_head_longer_than_a_tile_of_scores(kv_format):
    layer = layer_of(kv_format.with_options(num_sink_tokens=300))
    fleet = Fleet([layer])
    slot = fleet.add(make_stream([layer], 900, 1, torch.float32))
    for count in (200, 1, 120, 1, 300, 1):
        check_step(fleet, {slot: count})


# -- new tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_new", range(2, 9))
@BASE_FORMATS
def test_verifying_several_tokens_matches_the_oracle(kv_format, num_new):
    fleet, slots = ragged_fleet(layer_of(kv_format), (0, 5, 77, 333), gqa_group=4)
    check_step(fleet, dict.fromkeys(slots, num_new))
    check_step(fleet, dict.fromkeys(slots[1:], num_new), sliding_window=4)


@ALL_FORMATS
def test_chunks_on_odd_contexts_beside_decodes_match_the_oracle(kv_format):
    fleet, slots = ragged_fleet(
        layer_of(kv_format), (0, 1, 17, 131, 257, 450, 399, 63), new_tokens=320
    )
    check_step(fleet, dict(zip(slots, (33, 1, 31, 32, 129, 1, 300, 1), strict=True)))
    check_step(fleet, dict.fromkeys(slots, 1))
    check_step(fleet, dict.fromkeys(slots[:3], 33), attention_chunk=48)


def heads_first(tensor: Tensor) -> Tensor:
    """As a model has it: [heads, T, D] in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def part_of_a_projection(tensor: Tensor) -> Tensor:
    """Heads of queries, keys and values beside each other; the others are NaN."""
    nan = torch.full_like(tensor, torch.nan)
    return torch.cat([nan, tensor, nan], dim=1)[:, tensor.shape[1] : 2 * tensor.shape[1]]


def every_other_element(tensor: Tensor) -> Tensor:
    nan = torch.full_like(tensor, torch.nan)
    return torch.stack([tensor, nan], dim=-1)[..., 0]


@pytest.mark.parametrize("view", [heads_first, part_of_a_projection, every_other_element])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_new_tokens_may_be_views_in_any_precision(view, dtype, stored, monkeypatch):
    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return paged_attention(view(query), view(key), view(value), *args, **options)

    monkeypatch.setattr(helpers, "paged_attention", attention)
    layer = layer_of(INT4, key_dim=40, value_dim=24)
    fleet = Fleet([layer], dtype=stored)
    slots = [fleet.add(make_stream([layer], 400, seed, dtype, gqa_group=2)) for seed in range(2)]
    for counts in ((200, 3), (1, 1), (1, 190), (5, 1)):
        check_step(fleet, dict(zip(slots, counts, strict=True)), dtype=dtype)


def test_options_of_one_call_do_not_stay_for_the_next():
    fleet, slots = ragged_fleet(layer_of(INT2), (63, 450))
    for options in ({"softcap": 2.0}, {}, {"sink_logits": SINKS}, {"sliding_window": 20}, {}):
        check_step(fleet, dict.fromkeys(slots, 2), **options)


def test_layers_of_one_shape_and_different_formats_share_a_plan():
    layers = [
        layer_of(INT8.with_options(min_tail_tokens=32), key_dim=24),
        layer_of(INT4, key_dim=24),
        layer_of(INT2, key_dim=64, value_dim=8),
        layer_of(INT2.with_options(key_group_size=32), key_dim=24),
    ]
    fleet = Fleet(layers)
    slots = [fleet.add(make_stream(layers, 400, seed, torch.float32, 2)) for seed in range(2)]
    for counts in ((300, 10), (1, 1), (1, 9)):
        check_step(fleet, dict(zip(slots, counts, strict=True)))


# -- threads ------------------------------------------------------------------------------------


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[WorkItems]:
    """Short contexts are cut into parts too, and every plan made is kept for a look."""
    made: list[WorkItems] = []

    def plan(*args: Any) -> WorkItems:
        made.append(plan_items(*args))
        return made[-1]

    monkeypatch.setattr(cpu_plan, "MIN_SPLIT_TOKENS", TILE_TOKENS)
    monkeypatch.setattr(cpu_plan, "MIN_THREAD_TOKENS", 1)
    monkeypatch.setattr(cpu_plan, "plan_items", plan)
    return made


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch has no `GOMP_parallel`."""
    monkeypatch.setattr(cpu_threads, "openmp_library", lambda: None)
    monkeypatch.setattr(cpu_threads, "launcher", cache(cpu_threads.launcher.__wrapped__))
    assert cpu_threads.launcher() is cpu_threads.run_on_plain_threads


def num_parts(work: WorkItems) -> int:
    """Of the context that is cut into the most parts."""
    return int(work.arrays[0][:, Item.NUM_PARTS].max())


LONG = (1, 63, 640, 1500)
THREADED_OPTIONS = {
    "plain": {},
    "sink logits": {"sink_logits": SINKS},
    "softcap": {"softcap": 2.0},
    "window that most parts lie outside of": {"sliding_window": 150},
    "chunk that most parts lie outside of": {"attention_chunk": 200, "sink_logits": SINKS},
}


@pytest.mark.parametrize("options", THREADED_OPTIONS.values(), ids=THREADED_OPTIONS)
@ALL_FORMATS
def test_contexts_in_parts_on_two_threads_match_the_oracle(kv_format, options, two_threads, plans):
    fleet, slots = ragged_fleet(layer_of(kv_format), LONG)
    check_step(fleet, dict.fromkeys(slots, 1), **options)
    assert plans[-1].num_threads == 2
    assert num_parts(plans[-1]) > 5
    check_step(fleet, dict.fromkeys(slots, 3), **options)
    check_step(fleet, {slots[3]: 12, slots[2]: 1}, **options)


@pytest.mark.parametrize("num_new", [1, 4])
@ALL_FORMATS
def test_result_does_not_depend_on_the_number_of_threads(kv_format, num_new, plans):
    outputs = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            fleet, slots = ragged_fleet(layer_of(kv_format), LONG)
            results = fleet.step(dict.fromkeys(slots, num_new))
            outputs.append(torch.cat([results[slot][0] for slot in slots]))
            assert (num_parts(plans[-1]) == 1) == (num_threads == 1)
    finally:
        torch.set_num_threads(before)
    for output in outputs[1:]:
        assert relative_error(output, outputs[0].double().numpy()) <= 1e-6


@BASE_FORMATS
def test_plain_threads_match_the_oracle(kv_format, two_threads, plain_threads, plans):
    fleet, slots = ragged_fleet(layer_of(kv_format), LONG)
    for num_new in (1, 1, 9):
        check_step(fleet, dict.fromkeys(slots, num_new))
    assert plans[-1].num_threads == 2


def calls_of_a_worker(num_threads: int) -> list[int]:
    """The arguments of every call of a worker that is run on so many threads."""
    calls: list[int] = []
    worker = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(calls.append)
    address = ctypes.cast(worker, ctypes.c_void_p).value
    assert address is not None
    cpu_threads.launcher()(address, 4711, num_threads)
    return calls


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_every_thread_of_torch_runs_the_worker_once(num_threads):
    if cpu_threads.openmp_library() is None:
        pytest.skip("this torch has no GOMP_parallel")
    assert cpu_threads.launcher() is not cpu_threads.run_on_plain_threads
    assert calls_of_a_worker(num_threads) == [4711] * num_threads


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_plain_threads_run_the_worker_as_often(num_threads, plain_threads):
    assert calls_of_a_worker(num_threads) == [4711] * num_threads


# -- the plan -----------------------------------------------------------------------------------


@st.composite
def steps(draw: st.DrawFn) -> StepInputs:
    head = draw(st.sampled_from([0, 16, 64]))
    block_size = draw(st.sampled_from([64, 128]))
    query_lens, context_lens, num_sealed = [], [], []
    for _ in range(draw(st.integers(1, 5))):
        query_lens.append(draw(st.one_of(st.just(1), st.integers(1, 40))))
        context_lens.append(draw(st.one_of(st.integers(0, 300), st.integers(0, 30_000))))
        most = max(context_lens[-1] - head, 0) // block_size
        num_sealed.append(draw(st.one_of(st.just(0), st.just(most), st.integers(0, most))))
    return step_of(
        query_lens, context_lens, num_sealed, num_head_tokens=head, block_size=block_size
    )


def check_parts_of_rows(step: StepInputs, sequence: int, parts: NDArray[np.int64]) -> None:
    """The items of the same rows: they cover the context once, and only the last one ends it."""
    context_len, sealed = step.context_lens_host[sequence], int(step.num_sealed[sequence])
    parts = parts[np.lexsort((parts[:, Item.END], parts[:, Item.START]))]
    assert parts[0, Item.START] == 0
    assert (parts[1:, Item.START] == parts[:-1, Item.END]).all()
    assert (parts[:-1, Item.END] < context_len).all()
    assert parts[-1, Item.END] == context_len
    head = min(step.num_head_tokens, context_len)
    for edge in parts[1:, Item.START] - head:
        if sealed:
            assert 0 <= edge <= sealed * step.block_size
            assert edge % step.block_size == 0
        else:
            assert edge >= 0
            assert edge % TILE_TOKENS == 0
    assert (parts[:, Item.NUM_PARTS] == len(parts)).all()
    if len(parts) == 1:
        assert parts[0, Item.PARTIAL] == -1
    else:
        first = parts[0, Item.PARTIAL]
        assert (parts[:, Item.FIRST_PARTIAL] == first).all()
        assert parts[:, Item.PARTIAL].tolist() == list(range(first, first + len(parts)))
        assert len(set(parts[:, Item.COUNTER].tolist())) == 1


def check_items(step: StepInputs, num_kv_heads: int, group_size: int, work: WorkItems) -> None:
    items, counters, partials, *_ = work.arrays
    keys = (Item.SEQUENCE, Item.KV_HEAD, Item.FIRST_ROW, Item.NUM_ROWS)
    groups: dict[tuple[int, ...], list[NDArray[np.int64]]] = {}
    for item in items:
        groups.setdefault(tuple(item[list(keys)].tolist()), []).append(item)
    expected = {
        (sequence, head, first, min(length * group_size - first, MAX_ITEM_ROWS))
        for sequence, length in enumerate(step.query_lens)
        for head in range(num_kv_heads)
        for first in range(0, length * group_size, MAX_ITEM_ROWS)
    }
    assert groups.keys() == expected
    for (sequence, *_), parts in groups.items():
        check_parts_of_rows(step, sequence, np.stack(parts))
    split = items[items[:, Item.NUM_PARTS] > 1]
    assert sorted(split[:, Item.PARTIAL].tolist()) == list(range(len(partials)))
    counter_of = {int(item[Item.FIRST_PARTIAL]): int(item[Item.COUNTER]) for item in split}
    assert len(set(counter_of.values())) == len(counter_of)
    # The first two count items and threads.
    assert all(2 <= counter < len(counters) for counter in counter_of.values())
    assert len(work.zeros) == counters.nbytes


@settings(max_examples=80, deadline=None)
@given(
    step=steps(),
    num_kv_heads=st.integers(1, 4),
    group_size=st.sampled_from([1, 3, 8, 33]),
    num_threads=st.sampled_from([1, 2, 7, 64]),
)
def test_items_cover_rows_heads_and_context_exactly_once(
    step, num_kv_heads, group_size, num_threads
):
    work = plan_items(step, num_kv_heads, group_size, num_threads)
    check_items(step, num_kv_heads, group_size, work)
    assert 1 <= work.num_threads <= num_threads
    if num_threads == 1:
        assert (work.arrays[0][:, Item.NUM_PARTS] == 1).all()


def test_a_long_context_is_cut_so_that_all_threads_have_work():
    step = step_of([1], [16_384], [127], num_head_tokens=64)
    assert num_parts(plan_items(step, 1, 8, num_threads=8)) == 16
    assert num_parts(plan_items(step, 8, 1, num_threads=8)) > 1
    assert plan_items(step, 1, 8, num_threads=8).num_threads == 8


# -- what is stored -----------------------------------------------------------------------------

SEALING_FORMATS = {
    f"int{base.bits}-block{block_size}-group{group}": base.with_options(
        block_size=block_size, key_group_size=group
    )
    for base in (INT8, INT4, INT2)
    for block_size in (64, 128)
    for group in ((block_size,) if base is INT8 else (32, 64, 128))
    if group <= block_size
}


def store_twice(
    kv_format: KVFormat, dtype: torch.dtype, dims: tuple[int, int], tokens: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, LayerBlocks]:
    """Arenas after the torch reference and the CPU's kernels stored and sealed the same tokens.

    `tokens` are keys and values [blocks, block_size, heads, dim], one block each to seal. Tokens
    come from open blocks and from the step's own in turn; some new ones are appended as well.
    """
    keys, values = tokens
    num_seals, block_size, heads, _ = keys.shape
    layer = LayerSpec(kv_format=kv_format, num_kv_heads=heads, key_dim=dims[0], value_dim=dims[1])
    layout = layer.record_layout(dtype)
    size = layout.open_capacity
    generator = torch.Generator().manual_seed(1)
    num_open = -(-num_seals * block_size // size)
    is_open = torch.rand(num_seals * block_size, generator=generator) < 0.5
    is_open[:block_size] = True  # one block from open blocks alone
    is_open[-block_size:] = False  # and one from new tokens alone
    is_new = ~is_open
    shape = (num_seals + num_open + 4, heads, layout.record_bytes)
    arena = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    order = torch.randperm(num_open * size, generator=generator)[: len(is_open)]
    slots = num_seals * size + order
    new_index = torch.cumsum(is_new, 0) - 1
    sources = torch.where(is_open, slots, ~new_index)
    num_new = int(is_new.sum())
    num_stored = min(num_new, 3 * size)
    none = torch.zeros(1, 1, dtype=torch.int64)
    step = StepInputs(
        query_lens=(num_new,),
        context_lens_host=(0,),
        context_lens=none[0],
        query_start_loc=torch.tensor([0, num_new]),
        positions=torch.arange(num_new),
        open_table=none,
        sealed_table=none,
        num_sealed=none[0],
        stored_tokens=torch.randperm(num_new, generator=generator)[:num_stored],
        stored_slots=(num_seals + num_open) * size + torch.randperm(4 * size)[:num_stored],
        seal_block_ids=torch.randperm(num_seals, generator=generator),
        seal_sources=sources.view(num_seals, block_size),
        block_size=block_size,
        open_block_size=size,
        num_head_tokens=0,
    )
    flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
    before = layer_blocks(arena, layout, dtype, size)
    for open_blocks, flat in ((before.open_keys, flat_keys), (before.open_values, flat_values)):
        at = slots[is_open]
        open_blocks[at // size, :, at % size] = flat[is_open].to(dtype)
    arenas = arena.clone(), arena.clone()
    records = [layer_blocks(copy, layout, dtype, size) for copy in arenas]
    store.store_tokens(records[0], flat_keys[is_new], flat_values[is_new], step)
    cpu_store.store_tokens(records[1], flat_keys[is_new], flat_values[is_new], step)
    assert not torch.equal(arenas[0], arena)
    return *arenas, records[0]


@pytest.mark.parametrize("dims", [(8, 40), (40, 8), (64, 128), (128, 64), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_format", SEALING_FORMATS.values(), ids=SEALING_FORMATS)
def test_stored_bytes_are_those_of_the_reference(kv_format, dtype, dims):
    make = [tokens_of_every_kind]
    if dtype == torch.float32:
        make.append(in_float32_only)
    for kind in make:
        keys, values = (kind(kv_format.block_size, 2, dim, seed) for seed, dim in enumerate(dims))
        if dtype == torch.float16:
            keys, values = keys.clamp(-65504, 65504), values.clamp(-65504, 65504)
        expected, stored, records = store_twice(kv_format, dtype, dims, (keys, values))
        assert records.sealed is not None
        assert torch.isfinite(records.sealed.key_scale[: len(keys)]).all()
        assert torch.equal(stored, expected)


@pytest.mark.parametrize("kv_format", SEALING_FORMATS.values(), ids=SEALING_FORMATS)
def test_every_vector_width_stores_the_same_bytes(kv_format, lanes):
    keys, values = (tokens_of_every_kind(kv_format.block_size, 2, dim, dim) for dim in (24, 72))
    expected, stored, _ = store_twice(kv_format, torch.float32, (24, 72), (keys, values))
    assert torch.equal(stored, expected)


@BASE_FORMATS
def test_two_threads_store_the_same_bytes(kv_format, two_threads):
    if kv_format.is_native:
        kv_format = INT8.with_options(block_size=64, key_group_size=64)
    keys, values = (tokens_of_every_kind(kv_format.block_size, 3, 64, seed) for seed in (0, 1))
    expected, stored, _ = store_twice(kv_format, torch.bfloat16, (64, 64), (keys, values))
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_does(dtype):
    """Any bits, and what is halfway between two numbers of the lower precision."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    bits[::4] = bits[::4] & 0xFFFF0000 | 0x8000  # halfway as bfloat16
    bits[1::4] = bits[1::4] & 0xFFFFE000 | 0x1000  # as float16
    floats = torch.from_numpy(bits.view(np.float32))
    kernel = cpu_quantize.copy_kernel("float32", str(dtype).removeprefix("torch."))
    rounded = torch.empty(len(floats), 2, dtype=dtype)[:, 0]
    stride = 2 * dtype.itemsize
    kernel_call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(kernel.address)
    kernel_call(floats.data_ptr(), 4, rounded.data_ptr(), stride, len(floats))
    torch.testing.assert_close(rounded, floats.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_attention_alone_stores_nothing():
    fleet, slots = ragged_fleet(layer_of(INT8), (70, 200), gqa_group=2)
    plan = fleet.manager.reserve(np.array(slots), np.ones(2, dtype=np.int64))
    assert plan is not None
    step = fleet.cache.begin(plan)
    heads, dim = 2, fleet.cache.layers[0].key_dim
    before = fleet.cache.arenas[0].clone()
    new = torch.randn(2, heads, dim)
    cpu_attention.attend(new, new, new, fleet.cache.records[0], step.plan, scale=1.0)
    assert torch.equal(fleet.cache.arenas[0], before)


def test_infinite_values_saturate_in_8_bits():
    keys = torch.randn(4, 128, 2, 16, generator=torch.Generator().manual_seed(0))
    keys[0, ::7, :, 3] = torch.inf
    keys[1, ::5, 1, ::4] = -torch.inf
    keys[2] = torch.inf
    expected, stored, _ = store_twice(INT8, torch.float32, (16, 16), (keys, keys.flip(0)))
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_format", SEALING_FORMATS.values(), ids=SEALING_FORMATS)
def test_what_is_not_finite_is_sealed_as_in_the_reference(kv_format, dtype):
    """Equal but for the sign of zeros and the bits of NaN, which are not defined."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(5, kv_format.block_size, 2, 24, generator=generator)
    chance = torch.rand(keys.shape, generator=generator)
    for block, number in enumerate((torch.nan, torch.inf, -torch.inf)):
        keys[block][chance[block] < 0.02] = number
    keys[3][chance[3] < 0.02] = torch.inf
    keys[3][chance[3] > 0.98] = -torch.inf
    keys[4] = torch.where(chance[4] < 0.5, 0.0, -0.0)
    arenas = store_twice(kv_format, dtype, (24, 24), (keys, keys.flip(-1)))[:2]
    layer = LayerSpec(kv_format=kv_format, num_kv_heads=2, key_dim=24, value_dim=24)
    layout = layer.record_layout(dtype)
    expected, stored = (
        layer_blocks(arena, layout, dtype, layout.open_capacity).sealed for arena in arenas
    )
    assert expected is not None
    assert stored is not None
    for name, view in expected._asdict().items():
        if view is not None:
            is_same = torch.isclose(
                getattr(stored, name)[:5].float(), view[:5].float(), 0, 0, equal_nan=True
            )
            assert is_same.all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@ALL_FORMATS
def test_a_whole_cache_has_the_bytes_of_the_reference_after_every_step(
    kv_format, dtype, two_threads
):
    """Decode, chunks of several row tiles, contexts in parts; blocks are sealed on the way."""
    layers = [layer_of(kv_format, key_dim=24, value_dim=40), layer_of(kv_format, heads=3)]
    fleets = [Fleet(layers, dtype=dtype, backend=backend) for backend in ("cpu", "torch")]
    for fleet in fleets:
        for seed in range(3):
            fleet.add(make_stream(layers, 1600, seed, torch.float32))
    for counts in ((1150, 1, 33), (1, 1, 1), (300, 160, 97), (1, 200, 7), (20, 1, 1)):
        for fleet in fleets:
            fleet.step(dict(zip(fleet.streams, counts, strict=True)))
        for stored, expected in zip(*(fleet.cache.arenas for fleet in fleets), strict=True):
            assert torch.equal(stored, expected)


# -- what nobody wrote --------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 2])
@ALL_FORMATS
def test_scratch_may_hold_anything(kv_format, num_threads, monkeypatch, plans):
    """NaN in scratch, in partial results and in new tensors; Fleet fills unused blocks with it."""

    def poisoned_plan(*args: Any) -> WorkItems:
        work = plan_items(*args)
        work.arrays[2].fill(np.nan)
        return work

    def poison_scratch() -> None:
        for name, size in (
            ("attention", 4 * cpu_worker.SCRATCH_FLOATS),
            ("store", cpu_store.SCRATCH_BYTES),
        ):
            address = cpu_native.thread_scratch(name, num_threads, size).address
            ctypes.memset(address, NAN_BYTE, num_threads * size)

    def empty(*shape: int, **options: Any) -> Tensor:
        return torch.full(shape, torch.nan, **options)

    monkeypatch.setattr(cpu_plan, "plan_items", poisoned_plan)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        fleet, slots = ragged_fleet(layer_of(kv_format, key_dim=40), (1, 63, 700), gqa_group=3)
        for num_new, options in ((1, {}), (1, {"softcap": 4.0}), (5, {"sliding_window": 90})):
            expected = expected_outputs(fleet, {slots[2]: num_new}, **options)
            poison_scratch()
            with monkeypatch.context() as patch:
                patch.setattr(cpu_attention.torch, "empty", empty)
                outputs = fleet.step(dict.fromkeys(slots, num_new), **options)
            assert relative_error(outputs[slots[2]][0], expected[slots[2]]) <= limit_of(kv_format)
            assert all(torch.isfinite(output).all() for (output,) in outputs.values())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_new", [1, 3, 40])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("position", [5, 60, 200, 300, 332])
@ALL_FORMATS
def test_what_is_not_a_number_comes_through(kv_format, position, where, num_new):
    """One NaN, in head, body, tail or a new token: it shows in whatever sees it, nowhere else."""
    length = 332
    layer = layer_of(kv_format)
    fleet = Fleet([layer])
    slots = [fleet.add(make_stream([layer], 400, seed, torch.float32, 2)) for seed in range(2)]
    getattr(fleet.streams[slots[0]], where)[0][position, 0, 3] = torch.nan
    fleet.step(dict.fromkeys(slots, length))
    outputs = fleet.step(dict.fromkeys(slots, num_new))
    assert torch.isfinite(outputs[slots[1]][0]).all()
    bad, good = outputs[slots[0]][0].split(2, dim=1)  # query heads of the first kv head
    assert bad.isnan().any(-1).all()
    assert torch.isfinite(good).all()


# -- error bounds -------------------------------------------------------------------------------


@BASE_FORMATS
def test_error_stays_small_as_the_context_grows(kv_format):
    """Against float64 on the dequantized cache: what the arithmetic of the kernels adds."""
    layer = layer_of(kv_format, key_dim=128)
    fleet = Fleet([layer], num_blocks=4200 // kv_format.block_size * 9, max_model_len=8192)
    slot = fleet.add(make_stream([layer], 4200, 0, torch.float32, gqa_group=4))
    for length in (1, 63, 1000, 4096):
        fleet.step({slot: length - fleet.length(slot)}, sliding_window=1)
        check_step(fleet, {slot: 1})


# -- arithmetic ---------------------------------------------------------------------------------


def vector_function(
    emit: Callable[[cpu_vectors.Emitter, Any], Any], lanes: int
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """A function over arrays from one over vectors."""
    emitter = cpu_vectors.Emitter("function", 3)
    source, target, count = emitter.arguments
    with emitter.loop(emitter.long(0), count, lanes) as index:
        at = emitter.times(index, 4)
        vector = emitter.load(emitter.offset(source, at), cpu_vectors.FLOAT, lanes)
        emitter.store(emit(emitter, vector), emitter.offset(target, at))
    code = cpu_vectors.MachineCode("function", emitter.finish())

    def call(values: NDArray[np.float32]) -> NDArray[np.float32]:
        padded = np.zeros(-(-len(values) // lanes) * lanes, dtype=np.float32)
        padded[: len(values)] = values
        result = np.empty_like(padded)
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(code.address)
        function(padded.ctypes.data, result.ctypes.data, len(padded))
        return result[: len(values)]

    return call


@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_powers_of_two_are_exact_to_a_few_roundings(lanes):
    exp2 = vector_function(cpu_vectors.Emitter.exp2, lanes)
    values = np.linspace(-126, 0, 400_001, dtype=np.float32)
    result = exp2(values)
    expected = np.exp2(values.astype(np.float64))
    assert np.abs(result / expected - 1).max() <= 3e-7
    assert (result[1:] >= result[:-1] * (1 - 3e-7)).all()
    assert (exp2(np.arange(-126, 1, dtype=np.float32)) == np.exp2(np.arange(-126.0, 1.0))).all()
    far_below = exp2(np.array([-126.5, -1e3, -1e30, -np.inf], dtype=np.float32))
    assert ((far_below >= 0) & (far_below <= 2.0**-126)).all()


@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_tanh_is_exact_to_a_few_roundings(lanes):
    tanh = vector_function(cpu_microkernels.tanh, lanes)
    positive = np.concatenate(
        [np.geomspace(1e-30, 1e30, 2001), np.linspace(0, 12, 100_001), [np.inf]]
    ).astype(np.float32)
    result = tanh(positive)
    assert np.abs(result - np.tanh(positive.astype(np.float64))).max() <= 3e-7
    assert (result <= 1).all()
    assert (tanh(-positive) == -result).all()


# -- compiled code on disk ----------------------------------------------------------------------

ADD_TWO = """
import ctypes
from paged_kv.kernels.cpu import vectors as cpu_vectors
write = cpu_vectors._write
def noted(file, code):
    print("compiled")
    write(file, code)
cpu_vectors._write = noted
emitter = cpu_vectors.Emitter("add", 3)
a, b, target = emitter.arguments
emitter.store(emitter.builder.add(a, b), target)
code = cpu_vectors.MachineCode("add", emitter.finish())
result = ctypes.c_int64()
function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(code.address)
function(40, 2, ctypes.addressof(result))
print(result.value)
"""


def add_two(folder: Path) -> str:
    """Compile a small function in a new process, or read it from the folder; what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", ADD_TWO],
        cwd=ROOT,
        env={**os.environ, "PAGED_KV_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-500:]
    return result.stdout


def test_code_is_compiled_once_and_read_by_later_processes(tmp_path):
    folder = tmp_path / "not" / "there yet"
    assert add_two(folder) == "compiled\n42\n"
    (file,) = folder.iterdir()
    before = file.stat().st_mtime_ns
    assert add_two(folder) == "42\n"
    assert [path.name for path in folder.iterdir()] == [file.name]
    assert file.stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        assert add_two(tmp_path / "file" / "folder") == "compiled\n42\n"


def test_a_code_file_that_cannot_be_read_costs_only_time(tmp_path):
    add_two(tmp_path)
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    assert add_two(tmp_path) == "compiled\n42\n"


@pytest.mark.parametrize("damage", ["empty", "truncated", "one byte less", "garbage", "flipped"])
def test_a_damaged_code_file_is_compiled_again(tmp_path, damage):
    """A full disk or a crash leaves files like these."""
    add_two(tmp_path)
    (file,) = tmp_path.iterdir()
    code = file.read_bytes()
    flipped = bytearray(code)
    flipped[41] ^= 0xFF
    damaged = {
        "empty": b"",
        "truncated": code[: len(code) // 2],
        "one byte less": code[:-1],
        "garbage": b"no object file" * 50,
        "flipped": bytes(flipped),
    }
    file.write_bytes(damaged[damage])
    assert add_two(tmp_path) == "compiled\n42\n"
    assert add_two(tmp_path) == "42\n"


# -- memory -------------------------------------------------------------------------------------


@BASE_FORMATS
def test_a_cache_is_freed_with_all_that_kernels_made_of_it(kv_format):
    fleet, slots = ragged_fleet(layer_of(kv_format), (1, 300))
    fleet.step(dict.fromkeys(slots, 2), softcap=1.0, sink_logits=SINKS)
    records = fleet.cache.records[0]
    assert records.derived
    references = [weakref.ref(records), weakref.ref(fleet.cache.arenas[0])]
    del records, fleet
    gc.collect()
    assert [reference() for reference in references] == [None, None]


# -- found, not yet repaired ---------------------------------------------------------------------


def test_a_context_within_a_long_head_is_not_read_twice():
    """Two threads, a head of more than MIN_SPLIT_TOKENS: two parts end the context."""
    step = step_of([1], [1100], [0], num_head_tokens=2048)
    check_items(step, 1, 1, plan_items(step, 1, 1, num_threads=2))


def test_a_first_prompt_is_computed_by_all_threads():
    step = step_of([2048], [0], [0], num_head_tokens=64)
    assert plan_items(step, 4, 1, num_threads=2).num_threads == 2


def test_a_plan_keeps_its_scratch_when_more_threads_get_a_larger_one():
    step = step_of([1], [100], [0], num_head_tokens=64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        plan = cpu_plan.CpuPlan(step)
        memory = weakref.ref(plan.scratch.memory)
        torch.set_num_threads(7)
        larger = cpu_plan.CpuPlan(step)
    finally:
        torch.set_num_threads(before)
    gc.collect()
    assert memory() is not None
    assert larger.scratch.memory.size > plan.scratch.memory.size
