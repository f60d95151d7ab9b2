"""Calls that fail change nothing at all."""

from __future__ import annotations

import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.errors import InvalidStepError
from tests.support.arrays import ids
from tests.support.prefix_caching import (
    every_geometry,
    frozen,
    manager_of,
    match,
    serve,
    start,
    tokens,
)


def busy_manager(geometry: BlockGeometry) -> tuple[BlockManager, list[int]]:
    """Idle and shared cached blocks, a fork with a partial block, a new hit, swapped blocks."""
    manager = manager_of(geometry, num_blocks=40, num_host_blocks=40, record_events=True)
    serve(manager, tokens(30, 100))
    parent = start(manager, tokens(27))
    child = manager.fork(parent)
    manager.append_tokens([parent, child], [500, 501])
    swapped = start(manager, tokens(11, 300))
    manager.swap_out(swapped)
    hit = manager.add_sequence(tokens(26))
    return manager, [parent, child, hit]


@every_geometry
def test_a_reservation_that_does_not_fit_changes_nothing_at_all(geometry):
    manager, seq_ids = busy_manager(geometry)
    manager.pool.allocate(manager.num_free_blocks - 1)
    remaining = manager.num_tokens[seq_ids] - manager.num_computed_tokens[seq_ids]
    needed = manager.blocks_needed(ids(*seq_ids), remaining)
    assert needed.sum() > 1
    before = frozen(manager)
    assert manager.reserve(ids(*seq_ids), remaining) is None
    assert manager.reserve(ids(*seq_ids[::-1]), remaining[::-1], ids(0, 0, 0)) is None
    manager.blocks_needed(ids(*seq_ids), remaining)
    match(manager, tokens(60))
    assert frozen(manager) == before


@every_geometry
def test_a_refused_reservation_changes_nothing_at_all(geometry):
    manager, seq_ids = busy_manager(geometry)
    before = frozen(manager)
    for counts, drafts in (([60, 1, 1], None), ([1, 1, 0], None), ([2, 2, 2], [1, 2, 0])):
        with pytest.raises(InvalidStepError):
            manager.reserve(ids(*seq_ids), ids(*counts), drafts)
    assert frozen(manager) == before


@every_geometry
def test_a_rolled_back_step_leaves_every_user_count_and_table_as_it_was(geometry):
    manager, seq_ids = busy_manager(geometry)

    def state() -> object:
        return frozen(
            [
                manager.pool.ref_counts,
                manager.pool._free_stack[: manager.pool._stack_size],
                manager.prefix_cache,
                manager.num_computed_tokens,
                manager.num_sealed,
                [manager.block_ids(seq_id) for seq_id in seq_ids],
                manager.tables.capacity,
            ]
        )

    before = state()
    remaining = manager.num_tokens[seq_ids] - manager.num_computed_tokens[seq_ids]
    for _ in range(2):
        plan = manager.reserve(ids(*seq_ids), remaining)
        assert len(plan.copy_sources) <= 1
        manager.check_integrity()
        manager.rollback(plan)
        assert state() == before
    manager.check_integrity()


@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_swap_out_without_room_changes_nothing_at_all(blocks):
    manager = manager_of(num_host_blocks=blocks)
    seq_id = start(manager, tokens(22))
    before = frozen(manager)
    assert manager.swap_out(seq_id) is None
    assert frozen(manager) == before


def test_swap_in_without_room_changes_nothing_at_all():
    manager = manager_of(num_blocks=10, max_num_seqs=2, num_host_blocks=9)
    swapped = manager.swap_out(start(manager, tokens(22)))
    manager.pool.allocate(5)
    before = frozen(manager)
    assert manager.swap_in(swapped) is None
    assert frozen(manager) == before
    manager = manager_of(max_num_seqs=1, num_host_blocks=9)
    swapped = manager.swap_out(start(manager, tokens(22)))
    start(manager, tokens(3))
    before = frozen(manager)
    assert manager.swap_in(swapped) is None
    assert frozen(manager) == before


def test_a_swapped_sequence_ends_once():
    manager = manager_of(num_host_blocks=9)
    swapped = manager.swap_out(start(manager, tokens(9)))
    seq_id, _ = manager.swap_in(swapped)
    for end in (manager.swap_in, manager.discard_swapped):
        with pytest.raises(InvalidStepError, match="swapped in or discarded before"):
            end(swapped)
    swapped = manager.swap_out(seq_id)
    manager.discard_swapped(swapped)
    for end in (manager.swap_in, manager.discard_swapped):
        with pytest.raises(InvalidStepError, match="swapped in or discarded before"):
            end(swapped)
    assert manager.host_pool.num_free == 9
    manager.check_integrity()
