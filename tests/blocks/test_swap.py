"""Sequences that are swapped to the host with real tensors, and come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paged_kv.cache.formats import INT4
from tests.support.sharing_fleet import Twins, every_format, seal_length

SWAP_LENGTHS = [3, 40, 313]


def fill_the_pool(twins: Twins) -> None:
    """Somebody else takes every free block and writes it, then leaves."""
    fleet = twins.shared
    block_ids = fleet.manager.pool.allocate(fleet.manager.num_free_blocks)
    for arena in fleet.cache.arenas:
        arena[torch.as_tensor(block_ids, dtype=torch.int64)] = 0x55
    fleet.manager.pool.release(block_ids[::-1])
    fleet.poison_unused()


@every_format
@pytest.mark.parametrize("length", SWAP_LENGTHS)
def test_a_swap_round_trip_gives_every_byte_back(kv_format, length):
    twins = Twins(kv_format, num_host_blocks=60, num_blocks=60)
    seq_id = twins.start(length)
    fleet = twins.shared
    before, used = fleet.all_bytes(seq_id), fleet.num_used
    swapped, stream = fleet.swap_out(seq_id)
    assert fleet.num_used == 0
    assert fleet.manager.host_pool.num_allocated == used
    fill_the_pool(twins)
    again = fleet.swap_in(swapped, stream)
    fleet.manager.check_integrity()
    assert fleet.manager.host_pool.num_allocated == 0
    after = fleet.all_bytes(again)
    assert len(before) == len(after) == 2
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert fleet.length(again) == length


@every_format
@pytest.mark.parametrize("length", SWAP_LENGTHS)
def test_a_swapped_sequence_goes_on_as_if_it_had_never_left(kv_format, length):
    twins = Twins(kv_format, num_host_blocks=60, num_blocks=60)
    seq_id = twins.start(length)
    for counts in (1, twins.geometry.block_size, 1):
        swapped, stream = twins.shared.swap_out(seq_id)
        fill_the_pool(twins)
        again = twins.shared.swap_in(swapped, stream)
        twins.twin[again] = twins.twin.pop(seq_id)
        twins.chunks[again] = twins.chunks.pop(seq_id)
        seq_id = again
        twins.step({seq_id: counts})
    twins.check()
    twins.drain()


@every_format
def test_sequences_swapped_together_do_not_mix(kv_format):
    twins = Twins(kv_format, num_host_blocks=100, num_blocks=120)
    seq_ids = [twins.start(length, seed) for seed, length in enumerate((170, 20, 313))]
    bytes_before = [twins.shared.all_bytes(seq_id) for seq_id in seq_ids]
    swapped = [twins.shared.swap_out(seq_id) for seq_id in seq_ids]
    host_ids = np.concatenate([entry.host_block_ids for entry, _ in swapped])
    assert len(np.unique(host_ids)) == len(host_ids)
    fill_the_pool(twins)
    for (entry, stream), before in list(zip(swapped, bytes_before, strict=True))[::-1]:
        again = twins.shared.swap_in(entry, stream)
        for one, other in zip(before, twins.shared.all_bytes(again), strict=True):
            assert torch.equal(one, other)
    twins.shared.manager.check_integrity()


@every_format
def test_a_fork_is_swapped_while_its_parent_goes_on(kv_format):
    twins = Twins(kv_format, num_host_blocks=60)
    parent = twins.start(seal_length(twins.geometry) + 5)
    child = twins.fork(parent, seed=1)
    used = twins.shared.num_used
    swapped, stream = twins.shared.swap_out(child)
    assert twins.shared.num_used == used  # all of it was shared
    twin, chunks = twins.twin.pop(child), twins.chunks.pop(child)
    plan = twins.step({parent: 1})
    assert not len(plan.copy_sources)
    twins.step({parent: 140})
    again = twins.shared.swap_in(swapped, stream)
    twins.twin[again], twins.chunks[again] = twin, chunks
    assert not set(twins.shared.manager.block_ids(again)) & set(
        twins.shared.manager.block_ids(parent)
    )
    twins.step({again: 1, parent: 1})
    twins.step({again: 150})
    twins.check()
    twins.drain()


def test_a_swapped_sequence_may_be_given_up():
    twins = Twins(INT4, num_host_blocks=20)
    swapped, _ = twins.shared.swap_out(twins.start(200))
    twins.shared.manager.discard_swapped(swapped)
    assert twins.shared.manager.host_pool.num_free == 20
    twins.shared.manager.check_integrity()
