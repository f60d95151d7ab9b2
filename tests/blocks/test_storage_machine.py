"""Random steps of a block manager against the model: each token stays where it belongs."""

from __future__ import annotations

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
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.errors import OutOfBlocksError
from tests.support.arrays import ids
from tests.support.block_model import REAL, SMALL, locations, logical_blocks, manager_of, state_of
from tests.support.plan_reader import PlanReader, slot_mapping


class Storage:
    """What every block holds, as a dict from location to (sequence, position)."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.reader = PlanReader(manager.geometry)
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
        arrays = self.reader.read(plan)
        targets = slot_mapping(arrays).tolist()
        assert len(tokens) == plan.num_tokens == len(targets)
        written = {}
        moved = set()
        for block_id, sources in zip(
            plan.seal_block_ids.tolist(), arrays.seal_sources.tolist(), strict=True
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
        for token, target in zip(tokens, targets, strict=True):
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
        settings=settings(max_examples=90, stateful_step_count=20, deadline=None, derandomize=True),
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
