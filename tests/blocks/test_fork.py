"""Forks with real tensors: every sequence computes what it would compute alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paged_kv.cache.formats import INT2, NATIVE
from paged_kv.errors import InvalidStepError
from tests.support.arrays import ids
from tests.support.sharing_fleet import (
    PLACES,
    Twins,
    every_format,
    every_place,
    every_quantized,
    seal_length,
)

# -- forks go on as if they were alone ------------------------------------------------------------


@every_format
@every_place
def test_after_a_fork_both_go_on_as_if_alone(kv_format, place):
    twins = Twins(kv_format)
    parent = twins.start(place.length(twins.geometry))
    child = twins.fork(parent, seed=1)
    for counts in (1, 1, 2, 1, twins.geometry.block_size + 3, 1):
        twins.step({parent: counts, child: counts})
    twins.check()
    twins.drain()


@every_format
@every_place
def test_after_a_fork_one_goes_on_alone_and_the_other_later(kv_format, place):
    twins = Twins(kv_format)
    parent = twins.start(place.length(twins.geometry))
    child = twins.fork(parent, seed=1)
    for counts in (1, 3, twins.geometry.block_size, 1):
        twins.step({child: counts})
    twins.check()
    for counts in (2, twins.geometry.block_size + 7, 1):
        twins.step({parent: counts})
    twins.check()
    twins.step({child: 1, parent: 1})
    twins.drain()


@every_format
def test_a_fork_outlives_its_parent(kv_format):
    twins = Twins(kv_format)
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    twins.remove(parent)
    plan = twins.step({child: 1})
    assert not len(plan.copy_sources)  # nobody else uses the block any more
    twins.step({child: twins.geometry.block_size})
    twins.check()
    twins.drain()


@every_format
@pytest.mark.parametrize("place", PLACES[::2], ids=lambda place: place.name)
def test_forks_of_forks_go_on_as_if_alone(kv_format, place):
    twins = Twins(kv_format)
    family = [twins.start(place.length(twins.geometry))]
    for generation in range(2):
        for seq_id in list(family):
            family.append(twins.fork(seq_id, seed=10 * generation + seq_id + 1))
        twins.step(dict.fromkeys(family, generation + 1))
    twins.step({seq_id: number + 1 for number, seq_id in enumerate(family)})
    twins.step(dict.fromkeys(family, twins.geometry.block_size))
    twins.step(dict.fromkeys(family[::-1], 1))
    twins.check()
    twins.drain()


@pytest.mark.parametrize("kv_format", [NATIVE, INT2], ids=["native", "int2"])
def test_forks_in_half_precision_go_on_as_if_alone(kv_format):
    twins = Twins(kv_format, dtype=torch.bfloat16)
    parent = twins.start(seal_length(twins.geometry) + 5)
    child = twins.fork(parent, seed=1)
    for counts in (1, 130, 1):
        twins.step({child: counts, parent: counts})
    twins.check()


def test_a_fork_of_a_sequence_without_tokens_shares_nothing():
    twins = Twins(NATIVE)
    parent = twins.start(0)
    child = twins.fork(parent, seed=1)
    plan = twins.step({parent: 20, child: 20})
    assert not len(plan.copy_sources)
    assert twins.shared.num_used == 4
    twins.check()


# -- what is copied, and by whom ------------------------------------------------------------------


def last_block(twins: Twins, seq_id: int) -> int:
    return int(twins.shared.manager.head_and_tail_ids(seq_id)[-1])


PARTIAL = [place for place in PLACES if place.name in ("inside the first block", "inside the tail")]


@every_format
@pytest.mark.parametrize("place", PARTIAL, ids=lambda place: place.name)
def test_of_two_that_write_in_one_step_the_first_copies_and_the_last_keeps(kv_format, place):
    for first_in_step in (0, 1):
        twins = Twins(kv_format)
        parent = twins.start(place.length(twins.geometry))
        pair = [parent, twins.fork(parent, seed=1)]
        shared = last_block(twins, parent)
        first, last = pair[first_in_step], pair[1 - first_in_step]
        plan = twins.step({first: 1, last: 1})
        assert plan.copy_sources.tolist() == [shared]
        assert (
            plan.copy_targets.tolist() == plan.new_block_ids.tolist() == [last_block(twins, first)]
        )
        assert last_block(twins, last) == shared
        assert twins.shared.manager.pool.ref_counts[shared] == 1
        assert not len(twins.step({first: 1, last: 1}).copy_sources)
        twins.check()


@every_format
@pytest.mark.parametrize("writer", [0, 1], ids=["the parent writes", "the child writes"])
def test_the_one_that_writes_first_copies_and_the_other_never_does(kv_format, writer):
    twins = Twins(kv_format)
    parent = twins.start(PLACES[2].length(twins.geometry))
    pair = [parent, twins.fork(parent, seed=1)]
    shared = last_block(twins, parent)
    plan = twins.step({pair[writer]: 1})
    assert plan.copy_sources.tolist() == [shared]
    assert last_block(twins, pair[writer]) == plan.copy_targets[0] != shared
    assert last_block(twins, pair[1 - writer]) == shared
    assert not len(twins.step({pair[1 - writer]: 1}).copy_sources)
    assert last_block(twins, pair[1 - writer]) == shared
    twins.check()


@every_format
def test_the_copy_is_of_the_whole_block_in_every_layer(kv_format):
    twins = Twins(kv_format)
    fleet = twins.shared
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    plan = fleet.plan({child: 1})
    (source,), (target,) = plan.copy_sources.tolist(), plan.copy_targets.tolist()
    before = [arena[source].clone() for arena in fleet.cache.arenas]
    fleet.cache.begin(plan)
    for arena, expected in zip(fleet.cache.arenas, before, strict=True):
        assert torch.equal(arena[target], expected)
        assert torch.equal(arena[source], expected)
    fleet.manager.rollback(plan)
    assert fleet.manager.pool.ref_counts[source] == 2
    fleet.manager.check_integrity()


@every_format
@pytest.mark.parametrize(
    "place",
    [p for p in PLACES if p.name in ("behind the first block", "behind a tail block")],
    ids=lambda place: place.name,
)
def test_nothing_is_copied_where_the_fork_is_at_the_end_of_a_block(kv_format, place):
    twins = Twins(kv_format)
    parent = twins.start(place.length(twins.geometry))
    child = twins.fork(parent, seed=1)
    used = twins.shared.num_used
    plan = twins.step({parent: 1, child: 1})
    assert not len(plan.copy_sources)
    assert len(plan.new_block_ids) == 2
    assert twins.shared.num_used == used + 2
    twins.check()


@every_format
def test_a_long_chunk_fills_the_copy_and_goes_on_behind_it(kv_format):
    twins = Twins(kv_format)
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    count = 2 * twins.geometry.open_block_size
    plan = twins.step({child: count, parent: count})
    assert len(plan.copy_sources) == 1
    twins.check()


@every_format
def test_a_rolled_back_step_copies_for_nobody(kv_format):
    twins = Twins(kv_format)
    fleet = twins.shared
    parent = twins.start(PLACES[2].length(twins.geometry))
    child = twins.fork(parent, seed=1)
    before = fleet.num_used
    for _ in range(2):
        plan = fleet.plan({parent: 3, child: 2})
        fleet.cache.begin(plan)
        fleet.manager.rollback(plan)
        fleet.manager.check_integrity()
        assert fleet.num_used == before
        fleet.poison_unused()
    twins.step({parent: 3, child: 2})
    twins.check()


# -- seals of forks -------------------------------------------------------------------------------


@every_quantized
def test_forks_seal_the_tokens_they_share_into_blocks_of_their_own(kv_format):
    """The body holds the same tokens, so both blocks hold the same bytes."""
    twins = Twins(kv_format)
    parent = twins.start(seal_length(twins.geometry) - 1)
    child = twins.fork(parent, seed=1)
    plan = twins.step({parent: 1, child: 1})
    assert len(plan.seal_block_ids) == 2
    bodies = [twins.shared.manager.body_ids(seq_id).tolist() for seq_id in (parent, child)]
    assert bodies[0] != bodies[1]
    for layer in range(2):
        one, other = (twins.shared.sealed_bytes(seq_id, layer) for seq_id in (parent, child))
        # With a tail of 32 tokens behind it the body ends before the fork.
        assert torch.equal(one, other) == (twins.geometry.min_tail_tokens > 0)
    twins.check()


@every_quantized
@pytest.mark.parametrize("sealer", [0, 1], ids=["the parent seals", "the child seals"])
def test_one_seals_and_the_other_keeps_its_open_blocks(kv_format, sealer):
    twins = Twins(kv_format)
    parent = twins.start(seal_length(twins.geometry) - 1)
    pair = [parent, twins.fork(parent, seed=1)]
    one, other = pair[sealer], pair[1 - sealer]
    kept = twins.shared.manager.block_ids(other).tolist()
    plan = twins.step({one: 1})
    assert len(plan.seal_block_ids) == 1
    assert set(plan.freed_block_ids.tolist()) <= set(kept)
    assert twins.shared.manager.block_ids(other).tolist() == kept
    assert (twins.shared.manager.pool.ref_counts[plan.freed_block_ids] == 1).all()
    twins.check()
    twins.step({other: 1, one: 1})
    assert twins.shared.manager.num_sealed[pair].tolist() == [1, 1]
    twins.step({one: 150, other: 140})
    twins.check()
    twins.drain()


@every_quantized
def test_one_seals_while_the_other_writes_to_the_last_shared_block(kv_format):
    """The first takes a chunk that seals the shared partial block; the second adds one token."""
    for order in (1, -1):
        twins = Twins(kv_format)
        parent = twins.start(PLACES[2].length(twins.geometry))
        child = twins.fork(parent, seed=1)
        counts = {parent: 2 * twins.geometry.block_size, child: 1}
        twins.step(dict(list(counts.items())[::order]))
        twins.check()
        twins.step({parent: 1, child: 150})
        twins.check()
        twins.drain()


@every_quantized
def test_a_sealed_block_stays_shared_for_good(kv_format):
    twins = Twins(kv_format)
    parent = twins.start(seal_length(twins.geometry) + 5)
    children = [twins.fork(parent, seed=seed) for seed in (1, 2)]
    (body,) = twins.shared.manager.body_ids(parent).tolist()
    twins.step(dict.fromkeys([parent, *children], 200))
    for seq_id in (parent, *children):
        assert twins.shared.manager.body_ids(seq_id)[0] == body
    assert twins.shared.manager.pool.ref_counts[body] == 3
    twins.check()


# -- memory of forks ------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("num_forks", [1, 3, 7])
def test_n_forks_take_one_partial_block_each_and_share_all_others(kv_format, num_forks):
    twins = Twins(kv_format)
    parent = twins.start(seal_length(twins.geometry) + 5)
    used = twins.shared.num_used
    assert used == twins.geometry.blocks_held(seal_length(twins.geometry) + 5)
    family = [parent] + [twins.fork(parent, seed) for seed in range(1, num_forks + 1)]
    assert twins.shared.num_used == used
    plan = twins.step(dict.fromkeys(family, 1))
    assert len(plan.copy_sources) == num_forks
    assert twins.shared.num_used == used + num_forks
    assert twins.shared.manager.pool.peak_allocated == used + num_forks
    for seq_id in family[1:]:
        twins.remove(seq_id)
    assert twins.shared.num_used == used
    twins.check()


@every_format
def test_blocks_needed_counts_the_copies(kv_format):
    twins = Twins(kv_format)
    manager = twins.shared.manager
    parent = twins.start(PLACES[2].length(twins.geometry))
    family = ids(parent, twins.fork(parent, 1), twins.fork(parent, 2))
    users = manager.pool.ref_counts.copy()
    assert manager.blocks_needed(family, ids(1, 1, 1)).tolist() == [1, 1, 0]
    assert manager.blocks_needed(family[:1], ids(1)).tolist() == [1]
    assert np.array_equal(manager.pool.ref_counts, users)


def test_a_fork_without_room_for_its_copy_fails_as_a_whole():
    twins = Twins(NATIVE, num_blocks=3)
    parent = twins.start(20)
    child = twins.fork(parent, seed=1)
    manager = twins.shared.manager
    manager.pool.allocate(1)
    users = manager.pool.ref_counts.copy()
    assert manager.reserve(ids(parent, child), ids(1, 1)) is None
    assert np.array_equal(manager.pool.ref_counts, users)


def test_a_fork_needs_a_seq_id_and_a_sequence_and_no_open_step():
    twins = Twins(NATIVE)
    parent = twins.start(20)
    manager = twins.shared.manager
    with pytest.raises(InvalidStepError, match="seq_id 5 holds no sequence"):
        manager.fork(5)
    plan = twins.shared.plan({parent: 1})
    with pytest.raises(InvalidStepError, match="commit or roll back"):
        manager.fork(parent)
    manager.rollback(plan)
    assert manager.num_free_seqs == manager.max_num_seqs - 1
