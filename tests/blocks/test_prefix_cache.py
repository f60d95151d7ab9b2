"""Shared prefixes: how much is found, when it is published, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.block_tables import StoredLengths
from paged_kv.blocks.prefix_sharing import PrefixMatch
from paged_kv.blocks.token_chain import ExtraKey
from paged_kv.errors import InvalidStepError
from tests.support.arrays import ids
from tests.support.plan_reader import arrays_of
from tests.support.prefix_caching import (
    WIDE_HEAD,
    S,
    compute,
    every_geometry,
    geometry_of,
    hits,
    manager_of,
    match,
    serve,
    start,
    tokens,
)

# -- how much is hit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (50, 12)]
)
def test_one_token_at_least_is_left_to_compute(length, expected):
    manager = manager_of()
    serve(manager, tokens(12))
    seq_id = manager.add_sequence(tokens(length))
    assert manager.num_computed_tokens[seq_id] == expected
    assert len(manager.block_ids(seq_id)) == expected // 4


@pytest.mark.parametrize(
    ("length", "expected"),
    [(4, 0), (5, 4), (12, 4), (13, 4), (14, 12), (21, 12), (22, 20), (37, 28), (40, 36), (90, 36)],
)
def test_no_more_is_sealed_than_the_sequence_would_have_sealed_itself(length, expected):
    """Head 0-3, body 4-11, 12-19, 20-27 and 28-35, of which a tail of 2 has to be behind."""
    manager = manager_of(S)
    first = start(manager, tokens(40))
    seq_id = manager.add_sequence(tokens(length))
    assert manager.num_computed_tokens[seq_id] == expected
    assert manager.num_sealed[seq_id] == max(expected - 4, 0) // 8
    num_head = min(expected, 4) // 4
    assert (
        manager.head_and_tail_ids(seq_id).tolist()
        == (manager.head_and_tail_ids(first).tolist()[:num_head])
    )
    num_body = manager.num_sealed[seq_id]
    assert manager.body_ids(seq_id).tolist() == manager.body_ids(first).tolist()[:num_body]


@every_geometry
@pytest.mark.parametrize("length", range(1, 60, 3))
def test_a_sequence_ends_up_with_the_same_number_of_blocks_whatever_it_hit(geometry, length):
    manager = manager_of(geometry)
    serve(manager, tokens(60))
    seq_id = start(manager, tokens(length))
    assert manager.num_computed_tokens[seq_id] == length
    assert manager.num_sealed[seq_id] == geometry.num_sealed_blocks(ids(length))[0]
    assert len(manager.block_ids(seq_id)) == geometry.blocks_held(length)


def test_every_head_block_is_shared_on_its_own():
    manager = manager_of(WIDE_HEAD)
    first = start(manager, tokens(30))
    head = manager.head_and_tail_ids(first).tolist()[:2]
    assert hits(manager, tokens(2)) == 0
    assert hits(manager, [*tokens(2), 99]) == 2
    seq_id = manager.add_sequence([*tokens(4), 99])
    assert manager.head_and_tail_ids(seq_id).tolist() == head
    assert manager.pool.ref_counts[head].tolist() == [2, 2]


def test_the_open_tail_of_a_sealed_sequence_is_not_shared():
    manager = manager_of(S)
    start(manager, tokens(21))  # sealed to 12, and full open blocks 12-15 and 16-19
    assert manager.num_cached_blocks == 2
    assert hits(manager, tokens(50)) == 12


def test_what_is_hit_is_what_find_prefix_says():
    manager = manager_of(S)
    serve(manager, tokens(40))
    start(manager, tokens(14))
    found = match(manager, tokens(40))
    assert found == PrefixMatch(
        num_tokens=36,
        num_blocks=5,
        num_idle_blocks=3,
        lengths=(StoredLengths(36, 4),),
        next_link=None,
        is_pending=False,
    )
    free = manager.num_free_blocks
    seq_id = manager.add_sequence(tokens(40))
    assert manager.num_computed_tokens[seq_id] == found.num_tokens
    assert len(manager.block_ids(seq_id)) == found.num_blocks
    assert manager.stored_lengths(seq_id) == found.lengths
    assert free - manager.num_free_blocks == found.num_idle_blocks


def test_tokens_that_a_sequence_generates_are_found_too():
    manager = manager_of()
    seq_id = start(manager, tokens(3))
    for token_id in range(3, 10):
        manager.append_tokens([seq_id], [token_id])
        compute(manager, seq_id)
    manager.remove_sequence(seq_id)
    assert hits(manager, tokens(10)) == 8


@every_geometry
def test_a_block_that_decoding_fills_is_found_right_after_that_step(geometry):
    """Native ones and those of a head; sealed ones with their seal. The same, token by token."""
    manager, whole = manager_of(geometry), manager_of(geometry)
    seq_id = start(manager, tokens(1))
    for length in range(2, 60):
        manager.append_tokens([seq_id], [length - 1])
        compute(manager, seq_id)
        serve(whole, tokens(length))
        assert hits(manager, tokens(100)) == hits(whole, tokens(100))


def test_the_last_known_token_is_at_hand_whatever_made_the_sequence():
    manager = manager_of(num_host_blocks=9)
    seq_id = start(manager, tokens(9))
    assert manager.last_token_ids[seq_id] == 8
    manager.append_tokens([seq_id], [50])
    child = manager.fork(seq_id)
    assert manager.last_token_ids[child] == 50
    manager.append_tokens([child, seq_id], [60, 70, 80], [2, 1])
    assert manager.last_token_ids[[child, seq_id]].tolist() == [70, 80]
    back, _ = manager.swap_in(manager.swap_out(child))
    assert manager.last_token_ids[back] == 70
    assert manager.token_ids[back, :12].tolist() == [*tokens(9), 50, 60, 70]


def test_without_a_prefix_cache_nothing_is_hit():
    manager = manager_of(prefix_caching=False)
    serve(manager, tokens(12))
    nothing = (StoredLengths(0, 0),)
    assert match(manager, tokens(12)) == PrefixMatch(0, 0, 0, nothing, None, is_pending=False)
    assert manager.num_cached_blocks == 0
    assert manager.take_events() == []
    manager.reset_prefix_cache()


def test_hits_need_as_many_blocks_as_are_left_after_them():
    manager = manager_of()
    serve(manager, tokens(12))
    seq_id = manager.add_sequence(tokens(21))
    assert manager.blocks_needed(ids(seq_id), ids(9)).tolist() == [3]


def test_fresh_sequences_and_hits_are_computed_in_one_step():
    manager = manager_of(num_blocks=20)
    assert serve(manager, tokens(9)) == [0, 1, 2]
    hit, fresh = manager.add_sequence(tokens(10)), manager.add_sequence(tokens(6, 100))
    plan = manager.reserve(ids(fresh, hit), ids(6, 2))
    assert plan is not None
    assert plan.context_lens.tolist() == [0, 8]
    assert plan.positions.tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    assert plan.new_block_ids.tolist() == [2, 3, 4]
    arrays = arrays_of(manager, plan)
    assert arrays.stored_slots.tolist() == [8, 9, 10, 11, 12, 13, 16, 17]
    assert arrays.block_table.tolist()[1] == [0, 1, 4]
    manager.commit(plan)
    assert manager.block_ids(fresh).tolist() == [2, 3]
    assert manager.block_ids(hit).tolist() == [0, 1, 4]


# -- published when stored, and not before --------------------------------------------------------


@every_geometry
def test_a_link_is_found_after_commit_and_never_before(geometry):
    manager = manager_of(geometry)
    seq_id = manager.add_sequence(tokens(40))
    plan = manager.reserve([seq_id], [40])
    assert hits(manager, tokens(60)) == 0
    assert manager.num_cached_blocks == 0
    manager.commit(plan)
    expected = min(geometry.num_links(40), geometry.num_shareable_links(40) + 1)
    assert 0 < manager.num_cached_blocks <= expected
    assert hits(manager, tokens(60)) > 0


@every_geometry
def test_a_step_that_is_rolled_back_publishes_nothing(geometry):
    manager = manager_of(geometry, record_events=True)
    seq_id = manager.add_sequence(tokens(40))
    for _ in range(3):
        manager.rollback(manager.reserve([seq_id], [40]))
        manager.check_integrity()
        assert manager.num_cached_blocks == 0
        assert hits(manager, tokens(60)) == 0
    assert manager.take_events() == []
    assert manager.num_free_blocks == manager.num_blocks
    compute(manager, seq_id)
    assert hits(manager, tokens(60)) > 0


def test_a_link_is_found_as_soon_as_its_chunk_is_computed():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(11))
    found = []
    for _ in range(5):
        manager.commit(manager.reserve([seq_id], [2]))
        found.append(hits(manager, tokens(12)))
    assert found[-1] == 8
    assert found[1:3] == [4, 4]  # a block that its last token fills is found at once
    assert found == sorted(found)


def test_tokens_that_are_not_known_cannot_be_computed():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(3))
    with pytest.raises(InvalidStepError, match=r"seq_id 0 .* 4 tokens .* 3 are known"):
        manager.reserve([seq_id], [4])
    assert manager.num_free_blocks == manager.num_blocks
    compute(manager, seq_id)


@pytest.mark.parametrize("told", ["before commit", "after commit"])
def test_draft_tokens_are_published_when_they_are_kept_and_known(told):
    manager = manager_of()
    seq_id = start(manager, tokens(3))
    manager.append_tokens([seq_id], [3])
    plan = manager.reserve([seq_id], [5], [4])  # token 3 and drafts of 4 to 7
    arrays_of(manager, plan)
    if told == "before commit":
        manager.append_tokens([seq_id], [4, 5], [2])
    manager.commit(plan, [3])
    if told == "after commit":
        manager.append_tokens([seq_id], [4, 5], [2])
    manager.check_integrity()
    assert hits(manager, tokens(9)) == 4
    assert manager.num_cached_blocks == 1
    manager.append_tokens([seq_id], [60, 70, 80], [3])
    compute(manager, seq_id)
    assert hits(manager, [0, 1, 2, 3, 4, 5, 60, 70, 80]) == 8
    assert hits(manager, tokens(9)) == 4


def test_draft_tokens_that_nobody_told_are_not_published_as_something_else():
    """Eleven tokens are computed and kept, four are known: the rest of the row is zeros."""
    manager = manager_of(geometry_of(8, 8, 0, 0))
    seq_id = start(manager, [1, 2, 3])
    manager.append_tokens([seq_id], [4])
    plan = manager.reserve([seq_id], [8], [7])
    arrays_of(manager, plan)
    manager.commit(plan)
    assert hits(manager, [1, 2, 3, 4, 0, 0, 0, 0, 9]) == 0
    manager.check_integrity()
    manager.append_tokens([seq_id], range(5, 18), [13])
    compute(manager, seq_id)
    assert hits(manager, list(range(1, 18))) == 16
    assert manager.num_cached_blocks == 2


def test_a_tail_that_kept_drafts_beyond_where_it_is_sealed_is_no_corruption():
    """14 tokens would be sealed to 12, but drafts never are: 12 certain tokens and 4 drafts."""
    manager = manager_of(S, prefix_caching=False)
    seq_id = start(manager, tokens(11))
    manager.commit(manager.reserve([seq_id], [5], [4]))
    assert (manager.num_computed_tokens[seq_id], manager.num_sealed[seq_id]) == (16, 0)
    manager.check_integrity()
    manager.commit(manager.reserve([seq_id], [1]))
    assert manager.num_sealed[seq_id] == 1
    manager.commit(manager.reserve([seq_id], [6], [5]))
    manager.check_integrity()


# -- links that somebody is about to store --------------------------------------------------------


def is_pending(manager: BlockManager, token_ids: list[int], keys: Sequence[ExtraKey] = ()) -> bool:
    return match(manager, token_ids, keys).is_pending


@every_geometry
def test_a_prefix_is_pending_until_it_is_stored(geometry):
    manager = manager_of(geometry)
    assert not is_pending(manager, tokens(60))
    seq_id = manager.add_sequence(tokens(60))
    assert is_pending(manager, tokens(60))
    plan = manager.reserve([seq_id], [60])
    assert is_pending(manager, tokens(60))
    manager.commit(plan)
    assert not is_pending(manager, tokens(60))
    assert not manager.prefix_cache._pending


def test_a_prefix_stays_pending_when_its_step_is_rolled_back():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(9))
    manager.rollback(manager.reserve([seq_id], [9]))
    assert is_pending(manager, tokens(9))


def test_only_the_next_link_counts_as_pending():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(13))
    manager.commit(manager.reserve([seq_id], [6]))
    assert match(manager, tokens(13)).num_tokens == 4
    assert is_pending(manager, tokens(13))
    assert not is_pending(manager, [*tokens(4), 50, 51, 52, 53, 54])  # goes its own way
    assert not is_pending(manager, tokens(5))  # the one link that it may share is there
    assert not is_pending(manager, tokens(13), ("salt",))
    assert not is_pending(manager, tokens(4))


def test_a_prefix_is_not_pending_once_its_sequence_is_gone():
    manager = manager_of(num_host_blocks=9)
    seq_id = manager.add_sequence(tokens(9))
    manager.remove_sequence(seq_id)
    assert not is_pending(manager, tokens(9))
    seq_id = manager.add_sequence(tokens(13))
    manager.commit(manager.reserve([seq_id], [6]))
    assert is_pending(manager, tokens(13))
    assert manager.swap_out(seq_id) is not None
    assert not is_pending(manager, tokens(13))
    assert not manager.prefix_cache._pending


def test_links_that_a_sequence_only_may_share_are_not_pending():
    """What nobody computes now is never waited for: the last link of 12 tokens is hit by none."""
    manager = manager_of()
    manager.add_sequence(tokens(12))
    serve(manager, tokens(8))
    assert match(manager, tokens(13))[:1] == (8,)
    assert not is_pending(manager, tokens(13))


@pytest.mark.parametrize("leaving", [0, 1], ids=["the first leaves", "the second leaves"])
def test_a_prefix_is_pending_while_one_of_two_that_compute_it_lives(leaving):
    manager = manager_of()
    seq_ids = [manager.add_sequence(tokens(9)), manager.add_sequence(tokens(9))]
    manager.remove_sequence(seq_ids[leaving])
    assert is_pending(manager, tokens(9))
    manager.remove_sequence(seq_ids[1 - leaving])
    assert not is_pending(manager, tokens(9))


def test_a_prefix_is_pending_while_a_fork_of_the_one_that_computed_it_lives():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(13))
    plan = manager.reserve([seq_id], [6])
    arrays_of(manager, plan)
    manager.commit(plan)
    child = manager.fork(seq_id)
    manager.remove_sequence(seq_id)
    assert is_pending(manager, tokens(13))
    compute(manager, child)
    assert not is_pending(manager, tokens(13))


# -- reset and statistics -------------------------------------------------------------------------


def test_reset_is_refused_while_a_sequence_lives_and_forgets_nothing():
    manager = manager_of()
    serve(manager, tokens(12))
    seq_id = manager.add_sequence(tokens(3))
    with pytest.raises(InvalidStepError, match="in use by 1 sequences"):
        manager.reset_prefix_cache()
    assert hits(manager, tokens(13)) == 12
    manager.remove_sequence(seq_id)
    manager.reset_prefix_cache()
    assert hits(manager, tokens(13)) == 0


@every_geometry
def test_after_a_reset_every_block_is_free_and_nothing_is_found(geometry):
    manager = manager_of(geometry, num_blocks=30)
    serve(manager, tokens(50))
    serve(manager, tokens(20, 100))
    assert manager.num_cached_blocks
    manager.reset_prefix_cache()
    manager.check_integrity()
    assert manager.num_cached_blocks == 0
    assert manager.prefix_cache.num_idle == 0
    assert manager.num_free_blocks == 30
    assert hits(manager, tokens(60)) == 0
    serve(manager, tokens(50))
    assert hits(manager, tokens(60)) > 0
    manager.check_integrity()


def test_statistics_count_the_tokens_that_were_asked_for_and_hit():
    manager = manager_of()
    statistics = manager.prefix_statistics
    assert (statistics.num_queries, statistics.hit_rate) == (0, 0.0)
    serve(manager, tokens(12))  # hits 0 of 12
    serve(manager, tokens(12))  # hits 8 of 12
    serve(manager, tokens(6))  # hits 4 of 6
    hits(manager, tokens(12))  # only asks
    assert (statistics.num_queries, statistics.num_query_tokens) == (3, 30)
    assert statistics.num_hit_tokens == 12
    assert statistics.hit_rate == pytest.approx(0.4)


def test_forks_and_swaps_are_no_queries():
    manager = manager_of(num_host_blocks=9)
    seq_id = start(manager, tokens(9))
    child = manager.fork(seq_id)
    manager.swap_in(manager.swap_out(child))
    assert manager.prefix_statistics.num_queries == 1
