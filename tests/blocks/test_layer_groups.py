"""Groups of layers: a block table for each, what each lets go of, and what all of them share."""

from __future__ import annotations

import re

import pytest

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.block_tables import StoredLengths
from paged_kv.blocks.events import BlockRemoved, BlockStored
from paged_kv.blocks.retention import Retention
from paged_kv.errors import ConfigError, InvalidStepError
from tests.support.arrays import ids
from tests.support.prefix_caching import S, geometry_of, hits, manager_of, match, take_all, tokens

FULL = Retention()


def window(size: int) -> Retention:
    return Retention(window_size=size)


def compute(manager: BlockManager, seq_id: int, count: int) -> bool:
    """One step of so many tokens; False where there are no blocks for it."""
    plan = manager.reserve(ids(seq_id), ids(count))
    if plan is not None:
        manager.commit(plan)
    manager.check_integrity()
    return plan is not None


def start(manager: BlockManager, token_ids: list[int]) -> int:
    """A sequence with all its tokens computed, four a step."""
    seq_id = manager.add_sequence(token_ids)
    while left := int(manager.num_computable(ids(seq_id))[0]):
        assert compute(manager, seq_id, min(left, 4))
    return seq_id


def held(manager: BlockManager, seq_id: int) -> list[int]:
    """How many blocks each group holds of a sequence."""
    return [len(tables.block_ids(seq_id)) for tables in manager.groups]


def take(manager: BlockManager, count: int) -> None:
    """So many free blocks, as another user of the pool would."""
    manager.pool.allocate(count)


# -- what is let go -------------------------------------------------------------------------------


def test_a_group_holds_what_its_next_token_sees_in_whole_blocks():
    manager = manager_of(retentions=(FULL, window(6), window(1)))
    seq_id = start(manager, tokens(17))
    # The token at position 17 sees those from 12 on, or only itself: blocks of four tokens.
    assert held(manager, seq_id) == [5, 2, 1]
    full, near, last = manager.stored_lengths(seq_id)
    assert (full.num_stored, full.num_evicted) == (17, 0)
    assert (near.num_stored, near.num_evicted) == (5, 12)
    assert (last.num_stored, last.num_evicted) == (1, 16)


def test_a_group_of_chunks_lets_go_of_whole_chunks_that_are_whole_blocks():
    manager = manager_of(retentions=(FULL, Retention(chunk_size=6)))
    seq_id = start(manager, tokens(11))
    assert held(manager, seq_id)[1] == 3  # the first chunk ends within a block
    manager.append_tokens([seq_id], [11])
    assert compute(manager, seq_id, 1)
    assert held(manager, seq_id)[1] == 0  # the second does not


def test_the_head_stays_and_only_sealed_blocks_go():
    manager = manager_of(S, retentions=(FULL, window(1)))
    seq_id = start(manager, tokens(30))
    # A head of one block, three sealed ones of eight tokens, and what is not sealed yet.
    assert held(manager, seq_id) == [5, 2]
    assert manager.groups[1].body_ids(seq_id).tolist() == []


def test_a_chunk_of_very_many_blocks_is_let_go_too():
    geometry, size = geometry_of(4, 4, 0, 0), 8192
    manager = BlockManager(
        geometry,
        num_blocks=3 * size // 4,
        max_num_seqs=1,
        max_model_len=4 * size,
        retentions=(Retention(chunk_size=size),),
    )
    seq_id = manager.add_sequence()
    for _ in range(4):
        assert compute(manager, seq_id, size)
    assert held(manager, seq_id) == [0]


@pytest.mark.parametrize(
    ("num_windows", "size"),
    [pytest.param(6, 1024, id="Gemma 3"), pytest.param(1, 128, id="gpt-oss")],
)
def test_blocks_held_at_32k_are_those_of_one_full_group_and_of_windows(num_windows, size):
    block_size, length = 16, 32768
    manager = BlockManager(
        geometry_of(block_size, block_size, 0, 0),
        num_blocks=length // block_size + num_windows * 256,
        max_num_seqs=1,
        max_model_len=length + 100,
        retentions=(FULL, *[window(size)] * num_windows),
    )
    seq_id = manager.add_sequence()
    for _ in range(length // 2048):
        assert compute(manager, seq_id, 2048)
    full, near = length // block_size, size // block_size
    assert held(manager, seq_id) == [full, *[near] * num_windows]
    for _ in range(40):  # a window that begins within a block holds one more
        assert compute(manager, seq_id, 1)
        assert set(held(manager, seq_id)[1:]) <= {near, near + 1}
        assert sum(held(manager, seq_id)) <= manager.max_blocks(length + 40)


# -- one pool -------------------------------------------------------------------------------------


def test_a_step_takes_blocks_for_all_groups_or_for_none():
    retentions = (FULL, window(8), window(4))
    manager = manager_of(num_blocks=8, prefix_caching=False, retentions=retentions)
    seq_id = manager.add_sequence(tokens(20))
    assert manager.blocks_needed(ids(seq_id), ids(9)).tolist() == [9]
    assert not compute(manager, seq_id, 9)
    assert manager.num_free_blocks == 8
    assert held(manager, seq_id) == [0, 0, 0]
    assert compute(manager, seq_id, 8)
    assert held(manager, seq_id) == [2, 2, 1]  # block 5 has come back


def test_a_step_gives_each_group_its_plan_over_the_same_tokens():
    manager = manager_of(retentions=(FULL, window(4)))
    seq_id = start(manager, tokens(9))
    manager.append_tokens([seq_id], [9])
    plan = manager.reserve([seq_id], [1])
    first, second = plan.parts
    assert first is plan
    assert first.positions.tolist() == second.positions.tolist() == [9]
    assert first.context_lens.tolist() == [9]
    assert second.context_lens.tolist() == [5]  # of positions 4 to 8
    manager.commit(plan)


def test_a_step_that_is_rolled_back_gives_back_the_blocks_of_all_groups():
    manager = manager_of(retentions=(FULL, window(4)))
    seq_id = start(manager, tokens(8))
    child = manager.fork(seq_id)
    manager.append_tokens([seq_id, child], [8, 8])
    before, free = manager.all_block_ids(seq_id).tolist(), manager.num_free_blocks
    plan = manager.reserve([seq_id, child], [1, 1])
    assert manager.num_free_blocks == free - 4
    manager.rollback(plan)
    assert manager.num_free_blocks == free
    assert manager.all_block_ids(seq_id).tolist() == before
    manager.check_integrity()


def test_a_swapped_sequence_comes_back_in_all_groups():
    manager = manager_of(num_host_blocks=20, retentions=(FULL, window(6)))
    seq_id = start(manager, tokens(14))
    lengths, block_ids = manager.stored_lengths(seq_id), manager.all_block_ids(seq_id).tolist()
    swapped = manager.swap_out(seq_id)
    assert swapped.device_block_ids.tolist() == block_ids
    assert len(swapped.host_block_ids) == sum(expected := [4, 2])
    seq_id, new_ids = manager.swap_in(swapped)
    assert manager.stored_lengths(seq_id) == lengths
    assert manager.all_block_ids(seq_id).tolist() == new_ids.tolist()
    assert held(manager, seq_id) == expected
    manager.check_integrity()


def test_a_placed_sequence_has_a_length_for_each_group_and_the_same_tokens_in_all():
    manager = manager_of(retentions=(FULL, window(4)))
    chain = manager.chain_tokens(tokens(9))
    full, near = StoredLengths(9, 0), StoredLengths(5, 0, 4)
    for lengths in ([], [full], [full, near, near], [full, StoredLengths(5, 0)]):
        with pytest.raises(InvalidStepError, match="of 2 groups of layers"):
            manager.place_sequence(chain, lengths)
    assert manager.is_whole
    seq_id, block_ids = manager.place_sequence(chain, [full, near])
    assert manager.all_block_ids(seq_id).tolist() == block_ids.tolist()
    assert held(manager, seq_id) == [3, 2]
    manager.check_integrity()


def test_a_sequence_is_cut_only_where_every_group_still_has_what_is_seen():
    manager = manager_of(prefix_caching=False, retentions=(FULL, window(6)))
    seq_id = start(manager, tokens(18))
    with pytest.raises(InvalidStepError, match="sees what was let go"):
        manager.truncate(seq_id, 16)  # the token at 16 sees 11, whose block went
    manager.truncate(seq_id, 17)
    assert held(manager, seq_id) == [5, 2]
    manager.check_integrity()


# -- prefixes -------------------------------------------------------------------------------------


def test_a_prefix_is_found_where_each_group_has_what_it_needs():
    manager = manager_of(retentions=(FULL, window(4)))
    manager.remove_sequence(start(manager, tokens(17)))
    found = match(manager, tokens(17))
    assert found.num_tokens == 16
    # The window's group needs no more than the block that the next token sees.
    assert [its.num_stored for its in found.lengths] == [16, 4]
    assert found.num_blocks == 4 + 1
    assert hits(manager, tokens(13)) == 12


def test_no_prefix_is_found_of_which_one_group_lacks_its_part():
    manager = manager_of(num_blocks=10, retentions=(FULL, window(4)))
    manager.remove_sequence(start(manager, tokens(17)))
    assert [hits(manager, tokens(count)) for count in (9, 13, 17)] == [8, 12, 16]
    # What was let go first is evicted first: of the window's group the last block is left.
    take(manager, manager.num_free_blocks - 5)
    assert [hits(manager, tokens(count)) for count in (9, 13, 17)] == [0, 0, 16]
    take(manager, 1)
    assert manager.num_cached_blocks == 4  # all that the first group needs
    assert hits(manager, tokens(17)) == 0


def test_a_new_sequence_shares_blocks_group_by_group():
    manager = manager_of(retentions=(FULL, window(8), window(3)))
    first = start(manager, tokens(17))
    second = manager.add_sequence(tokens(17))
    assert manager.num_computed_tokens[second] == 16
    assert held(manager, second) == [4, 2, 1]
    for tables in manager.groups:
        assert tables.block_ids(second).tolist() == tables.block_ids(first)[:-1].tolist()
    manager.check_integrity()


def test_events_name_the_group_of_a_block():
    manager = manager_of(num_blocks=4, record_events=True, retentions=(FULL, window(4)))
    seq_id = start(manager, tokens(5))
    (link,) = manager.chain_tokens(tokens(5)).hashes
    stored = manager.take_events()
    assert [(type(each), each.group, each.block_hash) for each in stored] == [
        (BlockStored, 0, link),
        (BlockStored, 1, link),
    ]
    assert stored[0].block_id != stored[1].block_id
    manager.remove_sequence(seq_id)
    take_all(manager)
    removed = {(type(each), each.group, each.block_hash) for each in manager.take_events()}
    assert removed == {(BlockRemoved, 0, link), (BlockRemoved, 1, link)}


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "retentions",
    [(), None, FULL, (FULL, 1024), "full", (FULL,) * 257],
    ids=["none", "nothing", "no list", "a number", "text", "too many"],
)
def test_wrong_retentions_are_refused_by_name(retentions):
    with pytest.raises(ConfigError, match="retentions must be"):
        manager_of(retentions=retentions)


@pytest.mark.parametrize(
    "retentions", [(window(8), FULL), (Retention(chunk_size=8), window(9))], ids=["full", "chunk"]
)
def test_the_group_that_reaches_farthest_comes_first(retentions):
    with pytest.raises(ConfigError, match=re.escape("reaches farthest comes first")):
        manager_of(retentions=retentions)


@pytest.mark.parametrize("name", ["window_size", "chunk_size"])
def test_a_retention_sees_at_least_its_own_token(name):
    with pytest.raises(ConfigError, match=name):
        Retention(**{name: 0})
