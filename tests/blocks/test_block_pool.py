"""The pool: order of blocks, reference counts, its peak and its memory."""

from __future__ import annotations

import numpy as np
import pytest

from paged_kv.blocks.block_pool import BlockPool
from paged_kv.blocks.prefix_cache import PrefixCache
from paged_kv.errors import ConfigError, OutOfBlocksError
from tests.support.prefix_caching import compute, hits, manager_of, serve, tokens

# -- the pool -------------------------------------------------------------------------------------


def test_new_pool_hands_out_blocks_in_order():
    allocator = BlockPool(5)
    assert allocator.allocate(2).tolist() == [0, 1]
    assert allocator.allocate(3).tolist() == [2, 3, 4]
    assert (allocator.num_free, allocator.num_allocated) == (0, 5)


def test_last_freed_is_first_allocated():
    allocator = BlockPool(6)
    allocator.allocate(6)
    allocator.release(np.array([1, 4], dtype=np.int32))
    allocator.release(np.array([3], dtype=np.int32))
    assert allocator.allocate(1).tolist() == [3]
    assert allocator.allocate(2).tolist() == [1, 4]


def test_blocks_freed_together_come_back_in_the_same_order():
    allocator = BlockPool(6)
    block_ids = allocator.allocate(4)
    allocator.release(block_ids)
    assert allocator.allocate(6).tolist() == [0, 1, 2, 3, 4, 5]


def test_too_many_blocks_raise_and_take_none():
    allocator = BlockPool(3)
    allocator.allocate(1)
    with pytest.raises(OutOfBlocksError, match=r"^3 blocks asked for, 2 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2
    assert allocator.allocate(2).tolist() == [1, 2]


def test_allocating_no_block_gives_no_block():
    allocator = BlockPool(1)
    assert allocator.allocate(0).tolist() == []
    assert allocator.num_free == 1


def test_freeing_a_free_block_asserts():
    allocator = BlockPool(3)
    block_ids = allocator.allocate(2)
    allocator.release(block_ids[:1])
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.release(block_ids)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.release(np.array([2], dtype=np.int32))


def test_freeing_a_block_twice_in_one_call_asserts():
    allocator = BlockPool(3)
    allocator.allocate(2)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.release(np.array([1, 1], dtype=np.int32))


def test_handed_out_ids_are_not_views_of_the_pool():
    allocator = BlockPool(4)
    block_ids = allocator.allocate(2)
    kept = block_ids.copy()
    allocator.release(block_ids)
    allocator.allocate(1)
    allocator.release(np.array([0], dtype=np.int32))
    assert np.array_equal(block_ids, kept)


@pytest.mark.parametrize(
    "owned",
    [[0], [0, 1, 1], [0, 2], [0, 1, 2]],
    ids=["lost", "shared", "swapped", "free and owned"],
)
def test_integrity_check_of_the_pool_sees_any_other_owner_list(owned):
    allocator = BlockPool(4)
    allocator.allocate(2)
    allocator.check_integrity(np.array([1, 0], dtype=np.int32))
    with pytest.raises(AssertionError):
        allocator.check_integrity(np.array(owned, dtype=np.int32))


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_pool_without_blocks_is_refused(num_blocks):
    with pytest.raises(ConfigError, match=rf"num_blocks must be at least 1, got {num_blocks}$"):
        BlockPool(num_blocks)


# -- the pool and its memory ----------------------------------------------------------------------


def test_sharing_and_releasing_count_users():
    pool = BlockPool(4, PrefixCache(4, record_events=False))
    block_ids = pool.allocate(3)
    pool.share(block_ids[:2])
    pool.release(block_ids)
    assert pool.ref_counts.tolist() == [1, 1, 0, 0]
    assert (pool.num_free, pool.num_allocated) == (2, 2)
    pool.release(block_ids[:2])
    assert pool.num_free == 4
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(block_ids[:1])


def test_more_than_free_and_idle_blocks_cannot_be_allocated():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    with pytest.raises(OutOfBlocksError, match=r"^5 blocks asked for, 4 are free"):
        manager.pool.allocate(5)
    assert hits(manager, tokens(9)) == 8


def test_the_peak_counts_shared_blocks_once_and_idle_ones_not():
    manager = manager_of()
    serve(manager, tokens(8))
    assert manager.pool.peak_allocated == 2
    serve(manager, tokens(8, 100))
    assert manager.pool.peak_allocated == 2
    a, b = manager.add_sequence(tokens(9)), manager.add_sequence(tokens(9))
    compute(manager, a, b)
    assert manager.pool.peak_allocated == 4


def test_the_peak_counts_idle_blocks_that_are_hit():
    manager = manager_of()
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    manager.add_sequence(tokens(9))
    assert manager.pool.peak_allocated == 2
    manager.add_sequence(tokens(9, 100))
    assert manager.pool.peak_allocated == 4


def test_a_pool_of_a_million_blocks_takes_at_most_40_bytes_a_block():
    num_blocks = 1_000_000
    cache = PrefixCache(num_blocks, record_events=False)
    pool = BlockPool(num_blocks, cache)
    arrays = {
        id(value): value
        for owner in (pool, cache)
        for value in vars(owner).values()
        if isinstance(value, np.ndarray)
    }
    assert sum(array.nbytes for array in arrays.values()) <= 40 * num_blocks
    assert pool.allocate(num_blocks)[-1] == num_blocks - 1
