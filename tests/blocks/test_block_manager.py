"""The pool, the block tables and their steps: exact cases, and random ones against a model.

The model knows no counts or tables: it derives from a sequence's length which logical blocks have
to exist, and follows every single token through the writes that the plans order.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.block_pool import BlockPool
from paged_kv.blocks.block_tables import ragged_arange
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.errors import ConfigError, InvalidStepError, OutOfBlocksError
from tests.support.helpers import ids

REAL_GEOMETRIES = {
    "native": (16, 16, 0, 0),
    "int8": (128, 64, 64, 0),
    "int4": (128, 32, 32, 32),
    "int2": (128, 16, 16, 32),
}
SMALL_GEOMETRIES = {
    "native": (4, 4, 0, 0),
    "native with a head": (4, 4, 4, 0),
    "int8-like": (8, 4, 4, 0),
    "int2-like": (16, 2, 4, 5),
    "no head": (16, 4, 0, 6),
    "no head, no tail": (8, 2, 0, 0),
    "tail longer than a block": (4, 2, 2, 9),
    "one token a block": (4, 1, 0, 0),
}


def geometry_of(
    block_size: int, open_block_size: int, num_head_tokens: int, min_tail_tokens: int
) -> BlockGeometry:
    return BlockGeometry(
        block_size=block_size,
        open_block_size=open_block_size,
        num_head_tokens=num_head_tokens,
        min_tail_tokens=min_tail_tokens,
    )


SMALL = pytest.mark.parametrize(
    "geometry", [geometry_of(*g) for g in SMALL_GEOMETRIES.values()], ids=SMALL_GEOMETRIES
)
REAL = pytest.mark.parametrize(
    "geometry", [geometry_of(*g) for g in REAL_GEOMETRIES.values()], ids=REAL_GEOMETRIES
)


def manager_of(
    geometry: BlockGeometry,
    num_blocks: int = 100,
    max_num_seqs: int = 4,
    max_model_len: int = 1000,
) -> BlockManager:
    return BlockManager(
        geometry, num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )


def compute(manager: BlockManager, counts: dict[int, int]) -> StepPlan:
    """Reserve and commit a step that has to fit."""
    plan = manager.reserve(ids(*counts), ids(*counts.values()))
    assert plan is not None
    read_index_arrays(plan)
    manager.commit(plan)
    return plan


def read_index_arrays(plan: StepPlan) -> None:
    """They are made when they are first read, which must be before the step ends."""
    for name in ("positions", "slot_mapping", "open_table", "sealed_table", "seal_sources"):
        getattr(plan, name)


def state_of(manager: BlockManager) -> dict[str, object]:
    """Everything that a caller can observe, the order of later allocations included."""
    seq_ids = manager.living_seq_ids.tolist()
    free = copy.deepcopy(manager.pool).allocate(manager.num_free_blocks)
    return {
        "lengths": {seq_id: int(manager.num_computed_tokens[seq_id]) for seq_id in seq_ids},
        "head and tail": {seq_id: manager.head_and_tail_ids(seq_id).tolist() for seq_id in seq_ids},
        "body": {seq_id: manager.body_ids(seq_id).tolist() for seq_id in seq_ids},
        "free, in order": free.tolist(),
        "free seq_ids": manager.num_free_seqs,
    }


# -- the model ----------------------------------------------------------------------------------


def num_sealed(geometry: BlockGeometry, length: int) -> int:
    """Blocks sealed of a sequence: as many as leave `min_tail_tokens` behind them."""
    count = 0
    if geometry.block_size == geometry.open_block_size:
        return count
    while (
        geometry.num_head_tokens + (count + 1) * geometry.block_size + geometry.min_tail_tokens
        <= length
    ):
        count += 1
    return count


def logical_blocks(geometry: BlockGeometry, length: int) -> list[tuple[str, int]]:
    """The blocks that a sequence of that length needs, in the order of its tokens."""
    head, body = geometry.num_head_tokens, num_sealed(geometry, length)
    blocks = []
    for position in range(length):
        if head <= position < head + body * geometry.block_size:
            block = ("sealed", (position - head) // geometry.block_size)
        else:
            block = ("open", position // geometry.open_block_size)
        if not blocks or blocks[-1] != block:
            blocks.append(block)
    return blocks


def locations(manager: BlockManager, seq_id: int) -> list[tuple[str, int, int]]:
    """Where each token of a sequence is stored: open or sealed, block id, offset."""
    geometry = manager.geometry
    length = int(manager.num_computed_tokens[seq_id])
    blocks = logical_blocks(geometry, length)
    block_ids = manager.block_ids(seq_id).tolist()
    assert len(block_ids) == len(blocks)
    assert manager.body_ids(seq_id).tolist() == [
        block_id for block_id, (kind, _) in zip(block_ids, blocks, strict=True) if kind == "sealed"
    ]
    found = []
    for (kind, _), block_id in zip(blocks, block_ids, strict=True):
        size = geometry.block_size if kind == "sealed" else geometry.open_block_size
        found += [(kind, block_id, offset) for offset in range(size)]
    return found[:length]


class Storage:
    """What every block holds, as a dict from location to (sequence, position)."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.names: dict[int, object] = {}
        self.cells: dict[tuple[str, int, int], tuple[object, int]] = {}

    def apply(self, plan: StepPlan) -> None:
        """Do the writes of a plan as a cache would: seal from what is stored, then append."""
        open_size = self.manager.geometry.open_block_size
        new_blocks = set(plan.new_block_ids.tolist())
        tokens = [
            (self.names[seq_id], start + offset)
            for seq_id, start, count in zip(
                plan.seq_ids.tolist(),
                plan.context_lens.tolist(),
                plan.num_scheduled_tokens.tolist(),
                strict=True,
            )
            for offset in range(count)
        ]
        assert [position for _, position in tokens] == plan.positions.tolist()
        assert len(tokens) == plan.num_tokens == len(plan.slot_mapping)
        written = {}
        moved = set()
        for block_id, sources in zip(
            plan.seal_block_ids.tolist(), plan.seal_sources.tolist(), strict=True
        ):
            assert block_id in new_blocks
            for offset, source in enumerate(sources):
                if source < 0:
                    token = tokens[~source]
                else:
                    cell = ("open", source // open_size, source % open_size)
                    token = self.cells[cell]
                    moved.add(cell)
                assert token not in written.values()
                written["sealed", block_id, offset] = token
        sealed = set(written.values())
        for token, target in zip(tokens, plan.slot_mapping.tolist(), strict=True):
            assert (target < 0) == (token in sealed), "a new token goes to exactly one place"
            if target >= 0:
                cell = ("open", target // open_size, target % open_size)
                assert cell not in written
                assert cell not in self.cells, "an occupied cell is written"
                written[cell] = token
        assert {block for _, block, _ in moved} == set(plan.freed_block_ids.tolist())
        self.cells |= written

    def forget(self, block_ids: list[int]) -> None:
        gone = set(block_ids)
        self.cells = {cell: token for cell, token in self.cells.items() if cell[1] not in gone}

    def check(self) -> None:
        """Every token of every living sequence is where the tables say, and nowhere else."""
        expected = {}
        for seq_id, name in self.names.items():
            for position, cell in enumerate(locations(self.manager, seq_id)):
                assert cell not in expected, "two tokens share a cell"
                expected[cell] = (name, position)
        assert self.cells == expected


class BlockManagerMachine(RuleBasedStateMachine):
    """Random adds, steps (committed or rolled back) and removals against the model."""

    geometry: BlockGeometry

    @initialize(num_blocks=st.sampled_from([150, 60, 30, 12]), max_num_seqs=st.integers(1, 4))
    def start(self, num_blocks: int, max_num_seqs: int) -> None:
        self.max_len = 8 * self.geometry.block_size
        self.manager = manager_of(self.geometry, num_blocks, max_num_seqs, self.max_len)
        self.storage = Storage(self.manager)
        self.lengths: dict[int, int] = {}
        self.num_added = 0
        for _ in range(max_num_seqs):
            self.add()

    @rule()
    def add(self) -> None:
        if len(self.lengths) == self.manager.max_num_seqs:
            with pytest.raises(OutOfBlocksError):
                self.manager.add_sequence()
            return
        seq_id = self.manager.add_sequence()
        assert seq_id not in self.lengths
        self.lengths[seq_id] = 0
        self.num_added += 1
        self.storage.names[seq_id] = self.num_added

    @precondition(lambda self: self.lengths)
    @rule(which=st.integers(0, 3))
    def remove(self, which: int) -> None:
        seq_id = sorted(self.lengths)[which % len(self.lengths)]
        freed = self.manager.block_ids(seq_id).tolist()
        self.manager.remove_sequence(seq_id)
        self.storage.forget(freed)
        del self.lengths[seq_id], self.storage.names[seq_id]

    @precondition(lambda self: self.lengths)
    @rule(
        wishes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
        commit=st.sampled_from([True, True, False]),
        written=st.booleans(),
    )
    def step_of_some(self, wishes: list[int], commit: bool, written: bool) -> None:
        living = list(self.lengths)[::-1]
        self.step(dict(zip(living, wishes, strict=False)), commit, written)

    @precondition(lambda self: self.lengths)
    @rule(num_steps=st.integers(1, 6), num_new=st.integers(1, 3))
    def decode_steps_of_all(self, num_steps: int, num_new: int) -> None:
        for _ in range(num_steps):
            self.step(dict.fromkeys(self.lengths, num_new), commit=True, written=True)

    def step(self, wishes: dict[int, int], commit: bool, written: bool) -> None:
        counts = {
            seq_id: min(count, self.max_len - self.lengths[seq_id])
            for seq_id, count in wishes.items()
            if count and self.lengths[seq_id] < self.max_len
        }
        if not counts:
            return
        manager, geometry = self.manager, self.geometry
        before = state_of(manager)
        new, old = {}, {}
        for seq_id, count in counts.items():
            had = logical_blocks(geometry, self.lengths[seq_id])
            needs = logical_blocks(geometry, self.lengths[seq_id] + count)
            new[seq_id] = len(set(needs) - set(had))
            old[seq_id] = [
                block_id
                for block, block_id in zip(had, manager.block_ids(seq_id).tolist(), strict=True)
                if block not in needs
            ]
        seq_ids, num_new = ids(*counts), ids(*counts.values())
        assert manager.blocks_needed(seq_ids, num_new).tolist() == list(new.values())
        plan = manager.reserve(seq_ids, num_new)
        if sum(new.values()) > manager.num_blocks - sum(
            len(logical_blocks(geometry, length)) for length in self.lengths.values()
        ):
            assert plan is None
            assert state_of(manager) == before
            return
        assert plan is not None
        manager.check_integrity()
        assert sorted(plan.new_block_ids.tolist()) == sorted(
            before["free, in order"][: sum(new.values())]
        )
        assert sorted(plan.freed_block_ids.tolist()) == sorted(
            block_id for blocks in old.values() for block_id in blocks
        )
        assert plan.context_lens.tolist() == [self.lengths[seq_id] for seq_id in counts]
        if commit:
            self.storage.apply(plan)
            manager.commit(plan)
            self.storage.forget(plan.freed_block_ids.tolist())
            for seq_id, count in counts.items():
                self.lengths[seq_id] += count
            return
        if written:  # whatever an abandoned step wrote must not have touched a stored token
            stored = dict(self.storage.cells)
            self.storage.apply(plan)
            assert stored.items() <= self.storage.cells.items()
            self.storage.cells = stored
        manager.rollback(plan)
        assert state_of(manager) == before

    @invariant()
    def tables_agree_with_the_model(self) -> None:
        if not hasattr(self, "manager"):
            return
        manager = self.manager
        manager.check_integrity()
        used = sum(len(logical_blocks(self.geometry, n)) for n in self.lengths.values())
        assert manager.pool.num_allocated == used
        assert manager.num_free_blocks + used == manager.num_blocks
        assert manager.living_seq_ids.tolist() == sorted(self.lengths)
        assert {seq_id: int(manager.num_computed_tokens[seq_id]) for seq_id in self.lengths} == (
            self.lengths
        )
        self.storage.check()

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for seq_id in list(self.lengths):
                self.manager.remove_sequence(seq_id)
            self.manager.check_integrity()
            assert self.manager.num_free_blocks == self.manager.num_blocks


@SMALL
def test_random_steps_agree_with_the_model(geometry):
    machine = type("Machine", (BlockManagerMachine,), {"geometry": geometry})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=150, stateful_step_count=20, deadline=None, derandomize=True
        ),
    )


@pytest.mark.parametrize("seed", range(3))
@REAL
def test_long_random_run_with_real_block_sizes_moves_each_token_from_where_it_was(geometry, seed):
    generator = np.random.default_rng(seed)
    manager = manager_of(geometry, num_blocks=300, max_num_seqs=3, max_model_len=900)
    storage = Storage(manager)
    for name in range(40):
        while manager.num_free_seqs:
            storage.names[manager.add_sequence()] = (name, manager.num_free_seqs)
        counts = {}
        for seq_id in list(storage.names):
            count = int(generator.choice([1, 1, 16, 100, 129, 300]))
            if manager.num_computed_tokens[seq_id] + count <= 900:
                counts[seq_id] = count
                continue
            freed = manager.block_ids(seq_id).tolist()
            manager.remove_sequence(seq_id)
            storage.forget(freed)
            del storage.names[seq_id]
        if counts:
            plan = manager.reserve(ids(*counts), ids(*counts.values()))
            assert plan is not None
            storage.apply(plan)
            manager.commit(plan)
            storage.forget(plan.freed_block_ids.tolist())
        storage.check()
        manager.check_integrity()


# -- the pool -----------------------------------------------------------------------------------


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


# -- the geometry -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 0, 0, 0), r"block_size \(8\) .* open_block_size \(0\)"),
        ((8, -4, 0, 0), r"open_block_size \(-4\)"),
        ((8, 3, 0, 0), r"block_size \(8\) .* open_block_size \(3\)"),
        ((8, 16, 0, 0), r"block_size \(8\) .* open_block_size \(16\)"),
        ((8, 4, 6, 0), r"num_head_tokens .* blocks of 4 tokens, got 6$"),
        ((8, 4, -4, 0), r"num_head_tokens .* got -4$"),
        ((8, 4, 4, -1), r"min_tail_tokens must not be negative, got -1$"),
    ],
)
def test_impossible_geometry_is_refused_with_its_values(sizes, message):
    with pytest.raises(ConfigError, match=message):
        geometry_of(*sizes)


@pytest.mark.parametrize("setting", ["max_num_seqs", "max_model_len"])
@pytest.mark.parametrize("value", [0, -3])
def test_manager_refuses_empty_limits(setting, value):
    with pytest.raises(ConfigError, match=rf"{setting} must be at least 1, got {value}$"):
        manager_of(geometry_of(4, 4, 0, 0), **{setting: value})


@SMALL
def test_counts_of_every_length_agree_with_the_model(geometry):
    for length in range(6 * geometry.block_size):
        blocks = logical_blocks(geometry, length)
        assert geometry.num_sealed_blocks(ids(length))[0] == num_sealed(geometry, length)
        assert geometry.sealed_table_width(length) == num_sealed(geometry, length)
        assert geometry.blocks_held(length) == len(blocks)
        assert geometry.open_table_width(max(length, 1)) >= sum(
            kind == "open" for kind, _ in blocks
        )


def most_blocks_at_once(geometry: BlockGeometry, num_tokens: int) -> list[int]:
    """For each length up to `num_tokens`: the peak of a growth by single tokens up to there."""
    peaks = [0]
    for length in range(1, num_tokens + 1):
        before = set(logical_blocks(geometry, length - 1))
        held = len(before | set(logical_blocks(geometry, length)))
        peaks.append(max(peaks[-1], held))
    return peaks


@SMALL
def test_max_blocks_is_the_exact_peak_of_growth_by_single_tokens(geometry):
    length = 7 * geometry.block_size + geometry.num_head_tokens + geometry.min_tail_tokens
    peaks = most_blocks_at_once(geometry, length)
    assert [geometry.max_blocks(n) for n in range(length + 1)] == peaks


@REAL
def test_pool_of_max_blocks_is_just_enough_to_grow_by_single_tokens(geometry):
    length = 460
    enough = geometry.max_blocks(length)

    def longest(num_blocks: int) -> int:
        manager = manager_of(geometry, num_blocks=num_blocks, max_model_len=length)
        seq_id = manager.add_sequence()
        for reached in range(length):
            plan = manager.reserve(ids(seq_id), ids(1))
            if plan is None:
                return reached
            manager.commit(plan)
        return length

    assert longest(enough) == length
    assert longest(enough - 1) < length


def test_ragged_arange_counts_within_each_row():
    rows, offsets = ragged_arange(ids(2, 0, 3, 1))
    assert rows.tolist() == [0, 0, 2, 2, 2, 3]
    assert offsets.tolist() == [0, 1, 0, 1, 2, 0]
    assert [len(part) for part in ragged_arange(ids())] == [0, 0]


# -- one step, by hand --------------------------------------------------------------------------

HAND = geometry_of(block_size=8, open_block_size=4, num_head_tokens=4, min_tail_tokens=2)


def test_first_step_of_a_prompt_seals_from_the_new_tokens():
    manager = manager_of(HAND)
    plan = compute(manager, {manager.add_sequence(): 15})
    # tokens 0-3 head, 4-11 sealed, 12-14 tail
    assert plan.seal_block_ids.tolist() == [0]
    assert plan.seal_sources.tolist() == [[~token for token in range(4, 12)]]
    assert plan.new_block_ids.tolist() == [0, 1, 2]
    assert plan.slot_mapping.tolist() == [4, 5, 6, 7, *[-1] * 8, 8, 9, 10]
    assert plan.freed_block_ids.tolist() == []
    assert plan.query_start_loc.tolist() == [0, 15]
    assert (plan.open_table.shape, plan.sealed_table.shape) == ((1, 0), (1, 0))
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
    assert plan.seal_sources.tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert plan.slot_mapping.tolist() == [13]
    assert plan.open_table.tolist() == [[0, 1, 2, 3]]
    assert plan.num_sealed.tolist() == [0]
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
    assert plan.seal_sources.tolist() == [[4, 5, *[~token for token in range(2, 8)]]]
    assert plan.freed_block_ids.tolist() == [1]


def test_native_blocks_never_seal():
    manager = manager_of(geometry_of(4, 4, 0, 0))
    seq_id = manager.add_sequence()
    for _ in range(50):
        plan = compute(manager, {seq_id: 3})
        assert not len(plan.seal_block_ids)
        assert (plan.slot_mapping >= 0).all()
    assert manager.block_ids(seq_id).tolist() == list(range(38))


# -- all or nothing -----------------------------------------------------------------------------


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
            if not name.endswith(
                ("_table", "_tables")
            ):  # compared by `state_of`, without their padding
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
        if name == "unended_tables":
            continue
        np.testing.assert_array_equal(array, getattr(plan, name), err_msg=name)


# -- sequences ----------------------------------------------------------------------------------


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
    with pytest.raises(OutOfBlocksError, match="all 2 sequence seq_ids are in use"):
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
        lambda manager: manager.tables.open.__setitem__((1, 0), manager.tables.open[0, 0]),
        lambda manager: manager.tables.sealed.__setitem__((0, 0), manager.tables.open[0, 0]),
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
