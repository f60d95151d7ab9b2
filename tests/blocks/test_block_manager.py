"""Steps of a block manager by hand: reserve, commit, roll back, and refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from paged_kv.errors import InvalidStepError, OutOfBlocksError
from tests.support.arrays import ids
from tests.support.block_model import (
    SMALL,
    compute,
    geometry_of,
    logical_blocks,
    manager_of,
    state_of,
)
from tests.support.plan_reader import arrays_of, slot_mapping

# -- one step, by hand ----------------------------------------------------------------------------

HAND = geometry_of(block_size=8, open_block_size=4, num_head_tokens=4, min_tail_tokens=2)


def test_first_step_of_a_prompt_seals_from_the_new_tokens():
    manager = manager_of(HAND)
    plan = compute(manager, {manager.add_sequence(): 15})
    # tokens 0-3 head, 4-11 sealed, 12-14 tail
    assert plan.seal_block_ids.tolist() == [0]
    arrays = arrays_of(manager, plan)
    assert arrays.seal_sources.tolist() == [[~token for token in range(4, 12)]]
    assert plan.new_block_ids.tolist() == [0, 1, 2]
    assert slot_mapping(arrays).tolist() == [4, 5, 6, 7, *[-1] * 8, 8, 9, 10]
    assert plan.freed_block_ids.tolist() == []
    assert plan.query_start_loc.tolist() == [0, 15]
    assert arrays.block_table[0, [0, 3]].tolist() == [1, 2]  # places 1 and 2 are to be sealed
    assert manager.block_ids(0).tolist() == [1, 0, 2]


def test_sealing_step_of_a_decode_moves_open_tokens_and_frees_their_blocks_at_commit():
    manager = manager_of(HAND)
    seq_id = manager.add_sequence()
    compute(manager, {seq_id: 13})
    assert manager.head_and_tail_ids(seq_id).tolist() == [0, 1, 2, 3]
    plan = manager.reserve(ids(seq_id), ids(1))
    assert plan is not None
    # token 13 makes the tail 8 + 2 long: blocks 1 and 2 are sealed into block 4
    assert plan.seal_block_ids.tolist() == [4]
    arrays = arrays_of(manager, plan)
    assert arrays.seal_sources.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert slot_mapping(arrays).tolist() == [13]
    assert arrays.block_table.tolist() == [[0, 1, 2, 3]]
    assert arrays.num_sealed.tolist() == [0]
    assert plan.freed_block_ids.tolist() == [1, 2]
    assert manager.num_free_blocks == 100 - 5
    manager.commit(plan)
    assert manager.num_free_blocks == 100 - 3
    assert manager.block_ids(seq_id).tolist() == [0, 4, 3]


def test_sealing_step_takes_old_tokens_from_open_slots_and_the_rest_from_the_chunk():
    manager = manager_of(HAND)
    first, second = manager.add_sequence(), manager.add_sequence()
    compute(manager, {first: 6, second: 1})
    plan = compute(manager, {second: 2, first: 9})
    # first stores 0-5 (blocks 0 and 1), and gets 6-14, which are new tokens 2-10
    assert plan.query_start_loc.tolist() == [0, 2, 11]
    assert plan.context_lens.tolist() == [1, 6]
    assert plan.positions.tolist() == [1, 2, *range(6, 15)]
    assert arrays_of(manager, plan).seal_sources.tolist() == [
        [4, 5, *[~token for token in range(2, 8)]]
    ]
    assert plan.freed_block_ids.tolist() == [1]


def test_a_table_widens_for_a_chunk_that_is_sealed_to_its_last_token():
    """No open block comes, but places do."""
    no_tail = geometry_of(block_size=8, open_block_size=4, num_head_tokens=4, min_tail_tokens=0)
    for last in (8 * 40, 8 * 40 + 1):
        manager = manager_of(no_tail, num_blocks=200, max_model_len=2000)
        seq_id = manager.add_sequence()
        compute(manager, {seq_id: 4 + 8 * 10})
        compute(manager, {seq_id: last})
        assert len(manager.block_ids(seq_id)) == 1 + 10 + 40 + (last % 8 > 0)
        assert manager.tables.ids.shape[1] >= no_tail.table_width(4 + 8 * 10 + last)
        manager.check_integrity()
        manager.remove_sequence(seq_id)
        assert manager.num_free_blocks == 200


def test_native_blocks_never_seal():
    manager = manager_of(geometry_of(4, 4, 0, 0))
    seq_id = manager.add_sequence()
    for _ in range(50):
        plan = compute(manager, {seq_id: 3})
        assert not len(plan.seal_block_ids)
        assert len(arrays_of(manager, plan).stored_slots) == plan.num_tokens
    assert manager.block_ids(seq_id).tolist() == list(range(38))


# -- all or nothing -------------------------------------------------------------------------------


@SMALL
def test_failed_reservation_changes_nothing(geometry):
    manager = manager_of(geometry, num_blocks=12)
    first, second = manager.add_sequence(), manager.add_sequence()
    compute(manager, {first: 7, second: 3})
    before = state_of(manager)
    assert manager.reserve(ids(first, second), ids(500, 1)) is None
    assert state_of(manager) == before
    manager.check_integrity()


@SMALL
def test_reservation_of_the_very_last_block_succeeds_and_of_one_more_fails(geometry):
    manager = manager_of(geometry, num_blocks=12)
    seq_id = manager.add_sequence()
    fits = max(n for n in range(1, 1000) if len(logical_blocks(geometry, n)) <= 12)
    assert manager.reserve(ids(seq_id), ids(fits + 1)) is None
    assert manager.reserve(ids(seq_id), ids(fits)) is not None
    assert manager.num_free_blocks == 0


@SMALL
@pytest.mark.parametrize("num_new", [1, 2, 7, 40])
def test_rollback_restores_everything_and_the_same_step_gives_the_same_plan(geometry, num_new):
    manager = manager_of(geometry, num_blocks=400)
    seq_ids = [manager.add_sequence() for _ in range(3)]
    for step in range(12):
        before = state_of(manager)
        plan = manager.reserve(ids(*seq_ids), ids(num_new, step + 1, 1))
        assert plan is not None
        manager.rollback(plan)
        assert state_of(manager) == before
        manager.check_integrity()
        again = manager.reserve(ids(*seq_ids), ids(num_new, step + 1, 1))
        assert again is not None
        for name, array in vars(plan).items():
            # What is over, and rows that the plan rolled back has told and that are told again.
            if name not in ("table_update", "is_over"):
                np.testing.assert_array_equal(array, getattr(again, name), err_msg=name)
        manager.commit(again)


@SMALL
def test_blocks_needed_is_what_reserve_takes(geometry):
    manager = manager_of(geometry, num_blocks=400)
    first, second = manager.add_sequence(), manager.add_sequence()
    generator = np.random.default_rng(0)
    for _ in range(40):
        counts = generator.integers(1, 2 * geometry.block_size, 2)
        if (manager.num_computed_tokens[[first, second]] + counts > 500).any():
            break
        needed = manager.blocks_needed(ids(first, second), counts)
        free = manager.num_free_blocks
        plan = manager.reserve(ids(first, second), counts)
        assert plan is not None
        assert len(plan.new_block_ids) == needed.sum() == free - manager.num_free_blocks
        manager.commit(plan)
    assert manager.num_computed_tokens[first] > 50


def test_plan_is_not_changed_by_later_steps():
    manager = manager_of(HAND)
    seq_id = manager.add_sequence()
    compute(manager, {seq_id: 13})
    plan = compute(manager, {seq_id: 1})
    kept = copy.deepcopy(plan)
    for _ in range(30):
        compute(manager, {seq_id: 3})
    for name, array in vars(kept).items():
        if name == "table_update":
            for part, told in vars(array).items():
                np.testing.assert_array_equal(told, getattr(plan.table_update, part))
            continue
        np.testing.assert_array_equal(array, getattr(plan, name), err_msg=name)


# -- sequences ------------------------------------------------------------------------------------


def test_seq_ids_are_lowest_first_and_reused_last_in_first_out():
    manager = manager_of(HAND, max_num_seqs=3)
    assert [manager.add_sequence() for _ in range(3)] == [0, 1, 2]
    manager.remove_sequence(0)
    manager.remove_sequence(2)
    assert manager.add_sequence() == 2
    assert manager.add_sequence() == 0


def test_no_seq_id_left_raises():
    manager = manager_of(HAND, max_num_seqs=2)
    manager.add_sequence()
    manager.add_sequence()
    with pytest.raises(OutOfBlocksError, match="all 2 sequences are in use"):
        manager.add_sequence()


@SMALL
def test_removed_sequence_frees_every_block_and_leaves_an_empty_seq_id(geometry):
    manager = manager_of(geometry)
    keeper, seq_id = manager.add_sequence(), manager.add_sequence()
    compute(manager, {keeper: 20, seq_id: 60})
    kept = manager.block_ids(keeper).tolist()
    manager.remove_sequence(seq_id)
    assert manager.pool.num_allocated == len(kept)
    assert manager.block_ids(keeper).tolist() == kept
    assert manager.add_sequence() == seq_id
    assert manager.block_ids(seq_id).tolist() == []
    manager.check_integrity()


def test_removing_twice_is_refused():
    manager = manager_of(HAND)
    seq_id = manager.add_sequence()
    manager.remove_sequence(seq_id)
    with pytest.raises(InvalidStepError, match=f"seq_id {seq_id} holds no sequence"):
        manager.remove_sequence(seq_id)


def test_one_step_at_a_time():
    manager = manager_of(HAND)
    seq_id = manager.add_sequence()
    plan = manager.reserve(ids(seq_id), ids(3))
    assert plan is not None
    with pytest.raises(InvalidStepError):
        manager.reserve(ids(seq_id), ids(1))
    with pytest.raises(InvalidStepError):
        manager.remove_sequence(seq_id)
    manager.commit(plan)
    with pytest.raises(InvalidStepError):
        manager.commit(plan)
    with pytest.raises(InvalidStepError):
        manager.rollback(plan)


@pytest.mark.parametrize(
    ("seq_id", "num_new"), [(0, 0), (0, -1), (0, 1001), (1, 1)], ids=["0", "-1", "too long", "idle"]
)
def test_step_that_makes_no_sense_is_refused(seq_id, num_new):
    manager = manager_of(HAND)
    manager.add_sequence()
    with pytest.raises(InvalidStepError):
        manager.reserve(ids(seq_id), ids(num_new))


@pytest.mark.parametrize("counts", [np.array([17.0]), ["x"], [None], [True]])
def test_counts_that_are_no_integers_are_refused_and_take_nothing(counts):
    manager = manager_of(HAND)
    seq_id = manager.add_sequence()
    with pytest.raises(InvalidStepError, match="num_new_tokens must be integers"):
        manager.reserve([seq_id], counts)
    assert manager.num_free_blocks == manager.num_blocks


def test_plain_lists_serve_and_an_empty_step_is_empty():
    manager = manager_of(HAND)
    seq_id = manager.add_sequence()
    manager.commit(manager.reserve([], []))
    plan = manager.reserve([seq_id], [3])
    assert plan.positions.tolist() == [0, 1, 2]
    manager.commit(plan)
    manager.check_integrity()


def test_a_plan_does_not_see_what_the_caller_does_to_its_arrays():
    manager = manager_of(HAND)
    seq_ids = ids(manager.add_sequence(), manager.add_sequence())
    plan = manager.reserve(seq_ids[:1], ids(5))
    seq_ids[0] = 1
    manager.rollback(plan)
    manager.check_integrity()


@pytest.mark.parametrize("seq_id", [-1, 99])
def test_removing_what_is_no_seq_id_is_refused(seq_id):
    manager = manager_of(HAND)
    for _ in range(manager.max_num_seqs):
        manager.add_sequence()
    with pytest.raises(InvalidStepError, match=f"seq_id {seq_id} holds no sequence"):
        manager.remove_sequence(seq_id)
    manager.check_integrity()


def test_step_of_one_sequence_twice_is_refused():
    manager = manager_of(HAND)
    seq_id = manager.add_sequence()
    with pytest.raises(InvalidStepError, match="twice"):
        manager.reserve(ids(seq_id, seq_id), ids(1, 1))
    with pytest.raises(InvalidStepError, match="shapes"):
        manager.reserve(ids(seq_id), ids(1, 1))
    assert manager.num_free_blocks == manager.num_blocks


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda manager: manager.pool.allocate(1),
        lambda manager: manager.pool.release(manager.block_ids(0)[-1:]),
        lambda manager: manager.num_computed_tokens.__setitem__(0, 40),
        lambda manager: manager.num_sealed.__setitem__(0, 0),
        lambda manager: manager.num_computed_tokens.__setitem__(2, 1),
        lambda manager: manager.tables.ids.__setitem__((1, 0), manager.tables.ids[0, 0]),
        lambda manager: manager.tables.ids.__setitem__((0, 1), manager.tables.ids[0, 0]),
    ],
    ids=["leak", "freed in use", "length", "seals", "idle seq_id", "shared open", "shared sealed"],
)
def test_integrity_check_sees_corruption(corrupt):
    manager = manager_of(HAND)
    compute(manager, {manager.add_sequence(): 20, manager.add_sequence(): 9})
    manager.check_integrity()
    corrupt(manager)
    with pytest.raises(AssertionError):
        manager.check_integrity()
