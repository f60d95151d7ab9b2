"""A plan is plain data: its arrays are the same whenever and wherever they are made."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable
from itertools import count, pairwise
from types import FrameType

import numpy as np
import pytest

from paged_kv.blocks import step_arrays
from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry, IntArray
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.table_replica import TableReplica
from paged_kv.errors import InvalidStepError
from tests.support.arrays import ids
from tests.support.block_model import REAL, SMALL, geometry_of, manager_of
from tests.support.plan_reader import PlanReader, slot_mapping


def assert_equal(arrays: StepArrays, others: StepArrays) -> None:
    for name, array in vars(arrays).items():
        assert array.dtype == np.int64, name
        np.testing.assert_array_equal(array, getattr(others, name), err_msg=name)


def steps_of(manager: BlockManager, seed: int, num_steps: int) -> list[dict[int, int]]:
    """New tokens of random sequences; what does not fit is left out by `reserve_part`."""
    generator = random.Random(seed)
    sizes = [1, 1, 1, 2, manager.geometry.open_block_size, 2 * manager.geometry.block_size + 1]
    return [
        {seq_id: generator.choice(sizes) for seq_id in range(4) if generator.random() < 0.7}
        for _ in range(num_steps)
    ]


def reserve_part(manager: BlockManager, counts: dict[int, int]) -> StepPlan:
    """A step of those sequences that still have room."""
    room = manager.max_model_len - manager.num_computed_tokens
    counts = {seq_id: count for seq_id, count in counts.items() if count <= room[seq_id]}
    plan = manager.reserve(ids(*counts), ids(*counts.values()))
    assert plan is not None
    return plan


@SMALL
def test_a_pickled_plan_gives_the_same_arrays_after_commit(geometry: BlockGeometry) -> None:
    """Another process may run the model: it sees nothing but the plans, and later."""
    manager = manager_of(geometry, num_blocks=1000, max_model_len=150)
    for _ in range(4):
        manager.add_sequence()
    here, there = PlanReader(geometry), PlanReader(geometry)
    parent = 0
    for turn, counts in enumerate(steps_of(manager, seed=turn_seed(geometry), num_steps=40)):
        plan = reserve_part(manager, counts)
        arrays = here.read(plan)
        data = pickle.dumps(plan)
        if turn % 5 == 4:
            manager.rollback(plan)
        else:
            manager.commit(plan)
        assert_equal(arrays, there.read(pickle.loads(data)))
        if turn % 7 == 6:  # a new sequence that shares an unfinished block
            manager.remove_sequence((parent + 1) % 4)
            assert manager.fork(parent) == (parent + 1) % 4
            parent = (parent + 1) % 4


def turn_seed(geometry: BlockGeometry) -> int:
    return geometry.block_size * 100 + geometry.open_block_size


@SMALL
def test_a_plan_may_be_made_while_the_step_before_still_runs(geometry: BlockGeometry) -> None:
    """begin k, commit k, reserve k + 1, and only then the kernels of k read what was staged."""
    manager, in_turn = manager_of(geometry, num_blocks=400), manager_of(geometry, num_blocks=400)
    readers = PlanReader(geometry), PlanReader(geometry)
    for _ in range(4):
        manager.add_sequence()
        in_turn.add_sequence()
    steps = steps_of(manager, seed=1, num_steps=20)
    plan = reserve_part(manager, steps[0])
    for counts, next_counts in pairwise(steps):
        staged = readers[0].read(plan)
        manager.commit(plan)
        plan = reserve_part(manager, next_counts)
        plan_in_turn = reserve_part(in_turn, counts)
        assert_equal(staged, readers[1].read(plan_in_turn))
        in_turn.commit(plan_in_turn)


def test_a_plan_that_nobody_saw_before_its_rollback_leaves_the_tables_right() -> None:
    geometry = geometry_of(8, 4, 4, 2)
    manager = manager_of(geometry)
    reader = PlanReader(geometry)
    parent = manager.add_sequence()
    plan = manager.reserve([parent], [18])
    assert plan is not None
    reader.read(plan)
    manager.commit(plan)
    child = manager.fork(parent)
    for is_seen in (False, True):
        plan = manager.reserve([parent, child], [1, 1])
        assert plan is not None
        assert len(plan.copy_sources) == 1
        if is_seen:
            reader.read(plan)
        manager.rollback(plan)
    plan = manager.reserve([child], [1])  # now the other one copies
    assert plan is not None
    arrays = reader.read(plan)
    assert slot_mapping(arrays).tolist() == [int(plan.copy_targets[0]) * 4 + 2]
    manager.commit(plan)
    plan = manager.reserve([parent], [1])
    assert plan is not None
    last = int(manager.block_ids(parent)[-1])
    assert slot_mapping(reader.read(plan)).tolist() == [last * 4 + 2]


@REAL
def test_a_block_table_alone_says_where_tokens_go(geometry: BlockGeometry) -> None:
    """As in an engine whose tables have a block for every open block's worth of tokens."""
    size, per_block = geometry.open_block_size, geometry.open_blocks_per_block
    generator = np.random.default_rng(0)
    lengths = np.zeros(3, dtype=np.int64)
    block_table = generator.permutation(3 * 64 * per_block).reshape(3, -1).astype(np.int32)
    for new in ([300, 1, 40], [1, 1, 1], [129, 400, 1], [1, 130, 300]):
        query_lens = np.array(new)
        starts = np.concatenate([[0], np.cumsum(query_lens)])
        arrays = StepArrays.from_block_table(geometry, starts, lengths + query_lens, block_table)
        np.testing.assert_array_equal(arrays.context_lens, lengths)
        np.testing.assert_array_equal(arrays.num_sealed, geometry.num_sealed_blocks(lengths))
        sealed_after = geometry.num_sealed_blocks(lengths + query_lens)
        slots, sources = slot_mapping(arrays).tolist(), arrays.seal_sources.tolist()
        seal_block_ids = arrays.seal_block_ids.tolist()
        for row in range(3):
            body_end = geometry.num_head_tokens + int(sealed_after[row]) * geometry.block_size
            for index in range(starts[row], starts[row + 1]):
                position = int(lengths[row]) + index - int(starts[row])
                assert arrays.cache_positions[index] == position
                in_body = geometry.num_head_tokens <= position < body_end
                slot = int(block_table[row, position // size]) * size + position % size
                assert slots[index] == (-1 if in_body else slot)
            for k in range(int(arrays.num_sealed[row]), int(sealed_after[row])):
                place = geometry.num_head_blocks + k * per_block
                assert seal_block_ids.pop(0) == block_table[row, place]
                first = place * size
                expected = [
                    int(block_table[row, p // size]) * size + p % size
                    if p < lengths[row]
                    else ~int(starts[row] + p - lengths[row])
                    for p in range(first, first + geometry.block_size)
                ]
                assert sources.pop(0) == expected
        assert not sources
        assert not seal_block_ids
        lengths += query_lens


@REAL
def test_nothing_is_computed_for_seals_where_nothing_seals(
    geometry: BlockGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manager_of(geometry, num_blocks=8000, max_num_seqs=64)
    reader = PlanReader(geometry)
    seq_ids = [manager.add_sequence() for _ in range(64)]
    num_calls = {True: 0, False: 0}  # of what looks for sources, by whether the step seals

    def counted(*arguments: object) -> IntArray:
        num_calls[bool(len(plan.seal_block_ids))] += 1
        return seal_sources(*arguments)

    seal_sources = step_arrays._seal_sources
    monkeypatch.setattr(step_arrays, "_seal_sources", counted)
    counts = np.random.default_rng(0).integers(1, 600, 64)
    for new in (counts, *[np.ones(64, dtype=np.int64)] * 30):
        plan = manager.reserve(seq_ids, new)
        assert plan is not None
        reader.read(plan)
        manager.commit(plan)
    assert not num_calls[False]
    assert bool(num_calls[True]) == geometry.seals


@REAL
def test_plans_are_applied_in_order_and_none_is_missed(geometry: BlockGeometry) -> None:
    manager, replica = manager_of(geometry, num_blocks=100), TableReplica(geometry)
    seq_id = manager.add_sequence()

    def step(count: int) -> StepPlan:
        plan = manager.reserve([seq_id], [count])
        assert plan is not None
        manager.commit(plan)
        return plan

    first = step(40)
    replica.apply(first)
    replica.apply(first)
    missed, third = step(1), step(1)
    block_table = replica.rows(first)[1]
    with pytest.raises(InvalidStepError, match="step 2 cannot begin here: 1 steps were begun"):
        replica.apply(third)
    np.testing.assert_array_equal(replica.rows(first)[1], block_table)
    replica.apply(missed)
    replica.apply(third)
    with pytest.raises(InvalidStepError, match="step 1 cannot begin here: 3 steps"):
        replica.apply(missed)


@REAL
def test_a_plan_that_is_applied_twice_as_two_copies_is_applied_once(
    geometry: BlockGeometry,
) -> None:
    manager, once, twice = (
        manager_of(geometry, num_blocks=200),
        PlanReader(geometry),
        PlanReader(geometry),
    )
    seq_id = manager.add_sequence()
    for num_new in (100, 300, 1, 200, 40):
        plan = manager.reserve([seq_id], [num_new])
        assert plan is not None
        twice.read(pickle.loads(pickle.dumps(plan)))
        assert_equal(twice.read(pickle.loads(pickle.dumps(plan))), once.read(plan))
        manager.commit(plan)


@REAL
def test_an_interrupted_replica_goes_on_after_the_rollback(
    geometry: BlockGeometry,
) -> None:
    """At every line of `apply` and what it calls; then the next plan is applied as ever."""
    manager, reader, truth = (
        manager_of(geometry, num_blocks=400, max_num_seqs=8),
        PlanReader(geometry),
        PlanReader(geometry),
    )
    seq_ids = [manager.add_sequence() for _ in range(3)]
    num_interrupts = 0
    for counts in ([100, 1, 40], [300, 128, 40], [1, 1, 1], [30, 250, 90]):
        for line in count(1):
            plan = manager.reserve(seq_ids, counts)
            assert plan is not None
            if not interrupted_at(line, lambda plan=plan: reader.replica.apply(plan)):
                break
            num_interrupts += 1
            manager.rollback(plan)
        assert_equal(reader.read(plan), truth.read(plan))
        manager.commit(plan)
        seq_ids.append(manager.add_sequence())
        seq_ids.pop(0)
    assert num_interrupts > 40


def interrupted_at(line: int, call: Callable[[], None]) -> bool:
    """Whether a call came as far as its n-th line in the replica, where it is interrupted."""
    num_lines = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal num_lines
        if not frame.f_code.co_filename.endswith("table_replica.py"):
            return None
        if event == "line":
            num_lines += 1
            if num_lines == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
