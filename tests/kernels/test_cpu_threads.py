"""The CPU's work items: on any number of threads, everything exactly once."""

from __future__ import annotations

import ctypes
import gc
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paged_kv.kernels.cpu import plan as cpu_plan
from paged_kv.kernels.cpu import threads as cpu_threads
from paged_kv.kernels.cpu.microkernels import TILE_TOKENS
from paged_kv.kernels.cpu.plan import WorkItems, plan_items
from paged_kv.kernels.cpu.records import ITEM_ROWS, Item
from paged_kv.kernels.step_inputs import StepInputs
from tests.support import cpu_kernels
from tests.support.attention_oracle import layer_of, ragged_fleet, relative_error
from tests.support.cpu_kernels import ALL_FORMATS, BASE_FORMATS, SINKS, check_step
from tests.support.step_inputs import step_of

on_cpu_kernels = cpu_kernels.on_cpu_kernels
plans = cpu_kernels.plans
two_threads = cpu_kernels.two_threads


# -- threads --------------------------------------------------------------------------------------


@pytest.fixture
def plain_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch has no `GOMP_parallel`."""
    monkeypatch.setattr(cpu_threads, "openmp_library", lambda: None)
    monkeypatch.setattr(cpu_threads, "launcher", cache(cpu_threads.launcher.__wrapped__))
    assert cpu_threads.launcher() is cpu_threads.run_on_plain_threads


def num_parts(work: WorkItems) -> int:
    """Of the context that is cut into the most parts."""
    return int(work.items[:, Item.NUM_PARTS].max())


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


# -- the plan -------------------------------------------------------------------------------------


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
    if len(parts) > 1:
        first = parts[0, Item.PARTIAL]
        assert (parts[:, Item.FIRST_PARTIAL] == first).all()
        assert parts[:, Item.PARTIAL].tolist() == list(range(first, first + len(parts)))
        assert len(set(parts[:, Item.COUNTER].tolist())) == 1


def check_items(step: StepInputs, num_kv_heads: int, group_size: int, work: WorkItems) -> None:
    items, partials = work.items, work.partials
    keys = (Item.SEQUENCE, Item.KV_HEAD, Item.FIRST_ROW, Item.NUM_ROWS)
    groups: dict[tuple[int, ...], list[NDArray[np.int64]]] = {}
    for item in items:
        groups.setdefault(tuple(item[list(keys)].tolist()), []).append(item)
    expected = {
        (sequence, head, first, min(length * group_size - first, ITEM_ROWS))
        for sequence, length in enumerate(step.query_lens)
        for head in range(num_kv_heads)
        for first in range(0, length * group_size, ITEM_ROWS)
    }
    assert groups.keys() == expected
    for (sequence, *_), parts in groups.items():
        check_parts_of_rows(step, sequence, np.stack(parts))
    split = items[items[:, Item.NUM_PARTS] > 1]
    assert sorted(split[:, Item.PARTIAL].tolist()) == list(range(len(partials)))
    counter_of = {int(item[Item.FIRST_PARTIAL]): int(item[Item.COUNTER]) for item in split}
    assert len(set(counter_of.values())) == len(counter_of)
    # The first two count items and threads.
    assert all(2 <= counter < len(work.counters) // 8 for counter in counter_of.values())
    assert len(work.zeros) == work.counters.nbytes


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
        assert (work.items[:, Item.NUM_PARTS] == 1).all()


def test_a_long_context_is_cut_so_that_all_threads_have_work():
    step = step_of([1], [16_384], [127], num_head_tokens=64)
    assert num_parts(plan_items(step, 1, 8, num_threads=8)) == 16
    assert num_parts(plan_items(step, 8, 1, num_threads=8)) > 1
    assert plan_items(step, 1, 8, num_threads=8).num_threads == 8


# -- found, not yet repaired ----------------------------------------------------------------------


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
