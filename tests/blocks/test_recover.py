"""A change that an exception cut off is known as such; `recover` starts from an empty manager."""

from __future__ import annotations

import random

import numpy as np
import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.events import BlockStored, CacheCleared
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.errors import InvalidStepError
from tests.support.interrupts import Lines
from tests.support.plan_reader import arrays_of
from tests.support.prefix_caching import every_geometry, manager_of, serve, start, tokens

NUM_TRIALS = 60


def whole_life(manager: BlockManager) -> None:
    """Everything that a manager does, once."""
    parent = start(manager, tokens(27))
    child = manager.fork(parent)
    manager.append_tokens([parent, child], [500, 501])
    window = manager.fitted_window(SinkWindow(0, 40))
    windowed = manager.add_sequence(manager.chain_tokens(tokens(70), sink_window=window))
    for _ in range(3):
        seq_ids = manager.living_seq_ids
        num_new = np.maximum(manager.num_computable(seq_ids), 1)
        is_known = manager.num_computable(seq_ids) > 0
        plan = manager.reserve(seq_ids[is_known], num_new[is_known])
        arrays_of(manager, plan)
        manager.rollback(plan)
        plan = manager.reserve(seq_ids[is_known], num_new[is_known])
        arrays_of(manager, plan)
        manager.commit(plan, spoilt_seq_ids=np.array([child]))
        manager.append_tokens(seq_ids, np.arange(len(seq_ids)))
    swapped = manager.swap_out(parent)
    again, _ = manager.swap_in(swapped)
    manager.discard_swapped(manager.swap_out(again))
    manager.publish_sequence(child)
    for seq_id in (child, windowed):
        manager.remove_sequence(seq_id)
    manager.take_events()
    manager.reset_prefix_cache()


def assert_is_like_new(manager: BlockManager) -> None:
    manager.check_integrity()
    assert manager.num_free_blocks == manager.num_blocks
    assert manager.num_free_seqs == manager.max_num_seqs
    assert manager.host_pool.num_free == manager.host_pool.num_blocks
    assert not manager.num_cached_blocks


@every_geometry
def test_interrupted_anywhere_a_manager_refuses_changes_until_it_has_recovered(geometry):
    manager = manager_of(geometry, num_blocks=200, num_host_blocks=200, record_events=True)
    counter = Lines(folders=["paged_kv/blocks/"])
    with counter.traced():
        whole_life(manager)
    num_lines = counter.count * 9 // 10  # what is kept for later runs costs no lines there
    rng, num_cut_off = random.Random(3), 0
    for _ in range(NUM_TRIALS):
        error = KeyboardInterrupt()
        lines = Lines(error, rng.randrange(1, num_lines), folders=["paged_kv/blocks/"])
        with pytest.raises(KeyboardInterrupt) as caught, lines.traced():
            whole_life(manager)
        assert caught.value is error
        if not manager.is_whole:
            num_cut_off += 1
            with pytest.raises(InvalidStepError, match=r"recover\(\) comes first"):
                manager.add_sequence(tokens(3))
        manager.recover()
        assert manager.is_whole
        assert_is_like_new(manager)
    assert num_cut_off > NUM_TRIALS // 4
    whole_life(manager)
    assert_is_like_new(manager)


@every_geometry
def test_recovery_itself_may_be_interrupted(geometry):
    manager = manager_of(geometry, num_blocks=60, num_host_blocks=8)
    counter = Lines(folders=["paged_kv/blocks/"])
    with counter.traced():
        manager.recover()
    for at in range(1, counter.count + 1):
        start(manager, tokens(27))
        lines = Lines(MemoryError(), at, folders=["paged_kv/blocks/"])
        with pytest.raises(MemoryError), lines.traced():
            manager.recover()
        manager.recover()
        assert_is_like_new(manager)


def test_who_follows_the_events_learns_that_nothing_is_cached_any_more():
    manager = manager_of(record_events=True)
    serve(manager, tokens(30))
    stored = [event for event in manager.take_events() if isinstance(event, BlockStored)]
    assert stored
    serve(manager, tokens(30, 100))
    hits = manager.prefix_statistics.num_query_tokens
    manager.recover()
    *before, last = manager.take_events()
    assert isinstance(last, CacheCleared)
    assert all(isinstance(event, BlockStored) for event in before)
    assert manager.prefix_statistics.num_query_tokens == hits
    manager.recover()
    assert manager.take_events() == [CacheCleared()]


def test_a_plan_of_before_cannot_be_committed_after_a_recovery():
    manager = manager_of()
    seq_id = manager.add_sequence(tokens(9))
    plan = manager.reserve([seq_id], [9])
    manager.recover()
    for end in (manager.commit, manager.rollback):
        with pytest.raises(InvalidStepError, match="not the one that was reserved last"):
            end(plan)
    manager.check_integrity()
