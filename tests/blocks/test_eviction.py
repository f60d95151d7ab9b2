"""Which cached block is taken first, and what happens to the content it had."""

from __future__ import annotations

import pytest

from paged_kv.blocks.retention import Retention
from tests.support.prefix_caching import (
    S,
    compute,
    hits,
    manager_of,
    serve,
    start,
    take_all,
    tokens,
)

# -- the order in which blocks are taken ----------------------------------------------------------


def test_blocks_nobody_can_find_are_taken_before_cached_ones():
    manager = manager_of(num_blocks=6)
    assert serve(manager, tokens(10)) == [0, 1, 2]  # block 2 is not full
    assert manager.num_free_blocks == 6
    assert take_all(manager) == [2, 3, 4, 5, 1, 0]


def test_one_allocation_takes_free_blocks_first_and_evicts_for_the_rest():
    manager = manager_of(num_blocks=6)
    serve(manager, tokens(10))
    assert manager.pool.allocate(5).tolist() == [2, 3, 4, 5, 1]
    assert hits(manager, tokens(10)) == 4


def test_the_last_block_of_a_sequence_is_evicted_first():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(16))
    found = []
    for _ in range(4):
        found.append(hits(manager, tokens(17)))
        manager.pool.allocate(1)
    assert found == [16, 12, 8, 4]
    assert hits(manager, tokens(17)) == 0


def test_the_last_block_of_a_sealed_sequence_is_evicted_first():
    manager = manager_of(S, num_blocks=5)
    seq_id = start(manager, tokens(22))
    assert manager.head_and_tail_ids(seq_id).tolist() == [2, 3]
    assert manager.body_ids(seq_id).tolist() == [0, 1]
    manager.remove_sequence(seq_id)
    assert take_all(manager) == [3, 4, 1, 0, 2]


def test_the_sequence_that_ended_first_is_evicted_first():
    manager = manager_of(num_blocks=4)
    a, b = start(manager, tokens(8)), start(manager, tokens(8, 100))
    manager.remove_sequence(b)
    manager.remove_sequence(a)
    assert take_all(manager) == [3, 2, 1, 0]


def test_a_hit_makes_blocks_the_last_to_be_evicted():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    seq_id = manager.add_sequence(tokens(5))  # hits block 0 alone
    assert manager.block_ids(seq_id).tolist() == [0]
    manager.remove_sequence(seq_id)
    assert take_all(manager) == [1, 3, 2, 0]


def test_asking_what_is_cached_does_not_change_what_is_evicted():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    assert hits(manager, tokens(9)) == 8
    assert take_all(manager) == [1, 0, 3, 2]


def test_a_shared_block_is_idle_only_when_its_last_user_has_left():
    manager = manager_of(num_blocks=4)
    a = start(manager, tokens(8))
    b = manager.add_sequence(tokens(9))
    manager.remove_sequence(a)
    assert manager.num_free_blocks == 2
    serve(manager, tokens(8, 100))
    manager.remove_sequence(b)
    assert take_all(manager) == [3, 2, 1, 0]


def test_blocks_freed_together_come_back_in_the_order_of_their_tokens():
    manager = manager_of(num_blocks=5, prefix_caching=False)
    seq_ids = [manager.add_sequence(tokens(8)) for _ in range(2)]
    compute(manager, *seq_ids)
    manager.remove_sequence(seq_ids[0])
    manager.remove_sequence(seq_ids[1])
    assert take_all(manager) == [2, 3, 0, 1, 4]


# -- hits under pressure --------------------------------------------------------------------------


def test_a_hit_is_never_evicted_by_its_own_allocation():
    """All four blocks are idle, the hit ones next to be evicted: the others go instead."""
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    seq_id = manager.add_sequence(tokens(16))
    plan = compute(manager, seq_id)
    assert plan.new_block_ids.tolist() == [3, 2]
    assert manager.block_ids(seq_id).tolist() == [0, 1, 3, 2]
    assert hits(manager, tokens(17)) == 16
    assert hits(manager, tokens(9, 100)) == 0


def test_a_hit_counts_as_taken_when_the_rest_does_not_fit():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    serve(manager, tokens(8, 100))
    seq_id = manager.add_sequence(tokens(17))
    assert manager.num_free_blocks == 2
    assert manager.reserve([seq_id], [9]) is None
    assert manager.block_ids(seq_id).tolist() == [0, 1]
    manager.remove_sequence(seq_id)
    assert hits(manager, tokens(9)) == hits(manager, tokens(9, 100)) == 8
    manager.check_integrity()


def test_two_new_sequences_share_what_neither_may_evict():
    manager = manager_of(num_blocks=4)
    serve(manager, tokens(8))
    a, b = manager.add_sequence(tokens(9)), manager.add_sequence(tokens(9))
    plan = compute(manager, a, b)
    assert plan.new_block_ids.tolist() == [2, 3]
    assert manager.pool.ref_counts.tolist() == [2, 2, 1, 1]
    assert manager.num_free_blocks == 0


def test_an_evicted_block_is_found_no_more_and_may_be_stored_again():
    manager = manager_of(num_blocks=3)
    serve(manager, tokens(12))
    assert serve(manager, tokens(4, 100)) == [2]
    assert hits(manager, tokens(13)) == 8
    assert hits(manager, tokens(5, 100)) == 4
    assert serve(manager, tokens(12)) == [0, 1, 2]
    assert hits(manager, tokens(13)) == 12
    assert hits(manager, tokens(5, 100)) == 0


def test_a_sequence_whose_first_block_is_gone_is_not_found_at_all():
    """Only an unused first block can go before later ones: here another sequence needed it."""
    manager = manager_of(num_blocks=3)
    a = start(manager, tokens(8))
    manager.remove_sequence(a)
    seq_id = manager.add_sequence(tokens(5))  # block 0 is young again, block 1 is the oldest
    manager.remove_sequence(seq_id)
    manager.pool.allocate(2)
    assert hits(manager, tokens(9)) == 4


# -- the same content twice -----------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first leaves first", "second first"])
@pytest.mark.parametrize("together", [True, False], ids=["one step", "two steps"])
def test_two_sequences_may_compute_the_same_content_side_by_side(order, together):
    manager = manager_of(num_blocks=6)
    seq_ids = [manager.add_sequence(tokens(9)), manager.add_sequence(tokens(9))]
    if together:
        compute(manager, *seq_ids)
    else:
        compute(manager, seq_ids[0])
        compute(manager, seq_ids[1])
    assert manager.num_cached_blocks == 2
    block_ids = [manager.block_ids(seq_id).tolist() for seq_id in seq_ids]
    assert not set(block_ids[0]) & set(block_ids[1])
    for index in order:
        manager.remove_sequence(seq_ids[index])
        manager.check_integrity()
    assert manager.num_free_blocks == 6
    found = manager.add_sequence(tokens(9))
    assert manager.block_ids(found).tolist() == block_ids[0][:2]  # those that were stored first
    assert manager.pool.ref_counts.sum() == 2


def test_the_second_copy_of_a_content_is_reused_before_the_cached_one():
    manager = manager_of(num_blocks=4)
    a, b = manager.add_sequence(tokens(8)), manager.add_sequence(tokens(8))
    compute(manager, a, b)
    manager.remove_sequence(a)
    manager.remove_sequence(b)
    assert take_all(manager) == [2, 3, 1, 0]


def test_what_is_computed_again_takes_the_place_of_a_copy_that_nobody_uses():
    manager = manager_of(num_blocks=6)
    a, b = manager.add_sequence(tokens(8)), manager.add_sequence(tokens(8))
    compute(manager, a)
    assert manager.block_ids(a).tolist() == [0, 1]
    manager.remove_sequence(a)
    assert serve(manager, tokens(4, 100)) == [2]
    compute(manager, b)
    manager.check_integrity()
    assert manager.block_ids(b).tolist() == [3, 4]
    assert manager.num_cached_blocks == 3
    found = manager.add_sequence(tokens(9))
    assert manager.block_ids(found).tolist() == [3, 4]
    manager.remove_sequence(found)
    manager.remove_sequence(b)
    assert take_all(manager) == [1, 0, 5, 2, 4, 3]  # the older content goes first


def test_what_one_group_of_layers_lost_is_as_young_in_the_other_when_it_is_computed_again():
    groups = (Retention(), Retention(window_size=4))
    manager = manager_of(num_blocks=12, retentions=groups)
    serve(manager, tokens(12))  # three blocks in each group; the window's are evicted first
    assert hits(manager, tokens(13)) == 12
    manager.pool.release(manager.pool.allocate(9))
    assert (manager.num_cached_blocks, hits(manager, tokens(13))) == (3, 0)
    serve(manager, tokens(12))
    assert (manager.num_cached_blocks, hits(manager, tokens(13))) == (6, 12)
    manager.pool.allocate(6 + 2)  # of the six that are cached, the two behind which the window is
    assert hits(manager, tokens(13)) == 12


def test_the_same_sealed_content_twice_is_cached_once():
    manager = manager_of(S, num_blocks=10)
    a, b = manager.add_sequence(tokens(14)), manager.add_sequence(tokens(14))
    compute(manager, a, b)
    assert manager.num_cached_blocks == 2  # head and body
    manager.remove_sequence(b)
    manager.remove_sequence(a)
    assert manager.num_free_blocks == 10
    manager.check_integrity()
