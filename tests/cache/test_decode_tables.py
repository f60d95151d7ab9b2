"""Decode steps that a device makes of its own block tables, against the arrays of their plans."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import triton

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.table_replica import TableReplica
from paged_kv.blocks.token_chain import TokenChain
from paged_kv.cache.decode_tables import BatchKind, DecodeBatch, DecodeTables, Drawn
from paged_kv.kernels.step_inputs import NO_WINDOW
from tests.support.arrays import ids
from tests.support.block_model import REAL, SMALL, manager_of
from tests.support.plan_reader import slot_mapping

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1"),
    # What NumPy says of the interpreter's own scalars.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
CPU = torch.device("cpu")
POISON = 1 << 40


def tables_of(manager: BlockManager) -> DecodeTables:
    sizes = {"max_num_seqs": manager.max_num_seqs, "max_model_len": manager.max_model_len}
    return DecodeTables(manager.geometry, CPU, **sizes)


class Device:
    """What a cache keeps of a manager's plans, and a second copy that gets only changes."""

    def __init__(self, manager: BlockManager) -> None:
        self.geometry = manager.geometry
        self.replica = TableReplica(manager.geometry)
        self.replica.note_changes()
        self.tables = tables_of(manager)
        self.batches: dict[BatchKind, DecodeBatch] = {}

    def run(self, plan: StepPlan) -> StepArrays:
        """A plan begins; where it is a decode step, the device's inputs are held to its arrays."""
        self.replica.apply(plan)
        arrays = StepArrays.from_plan(self.geometry, plan, self.replica)
        if self.tables.holds(plan):
            kind = BatchKind(
                num_rows=min(len(plan.seq_ids) + 1, self.tables.max_num_seqs),
                seals=len(plan.seal_block_ids) > 0,
                is_windowed=plan.window_sizes is not None,
            )
            batch = self.batches.setdefault(kind, DecodeBatch(self.tables, kind))
            step = batch.step.plan.step
            for made in (step.stored_slots, step.seal_sources, step.block_table):
                made.fill_(POISON)
            count = len(plan.seq_ids)
            sources = np.where(np.arange(count) % 2, count - 1 - np.arange(count), -1)
            drawn = torch.arange(count) + 900
            token_ids = np.arange(count) + 7
            batch.send(plan, self.replica, token_ids, Drawn(sources, drawn), {})
            batch.step.refresh()
            check(self.geometry, plan, arrays, batch)
        return arrays


def check(geometry: BlockGeometry, plan: StepPlan, arrays: StepArrays, batch: DecodeBatch) -> None:
    step, count = batch.step.plan.step, len(plan.seq_ids)
    told = [900 + count - 1 - row if row % 2 else 7 + row for row in range(count)]
    assert batch.step.token_ids[:count].tolist() == told
    numbers = {
        name: getattr(step, name).numpy()
        for name in ("context_lens", "num_sealed", "stored_slots", "block_table", "cache_positions")
    }
    assert numbers["stored_slots"].tolist()[:count] == slot_mapping(arrays).tolist()
    assert set(numbers["stored_slots"].tolist()[count:]) <= {-1}
    for name in ("context_lens", "num_sealed", "cache_positions"):
        assert numbers[name][:count].tolist() == getattr(arrays, name).tolist()
        assert not numbers[name][count:].any()
    for row, length in enumerate(arrays.context_lens.tolist()):
        width = geometry.table_width(length + 1)
        told = numbers["block_table"][row, :width].tolist()
        assert told == arrays.block_table[row, :width].tolist()
    block_ids = step.seal_block_ids.tolist()
    sealed = {n: step.seal_sources[row].tolist() for row, n in enumerate(block_ids) if n >= 0}
    expected = zip(arrays.seal_block_ids.tolist(), arrays.seal_sources.tolist(), strict=True)
    assert sealed == dict(expected)
    assert step.query_start_loc.tolist() == list(range(batch.kind.num_rows + 1))


def decode(manager: BlockManager, device: Device, *seq_ids: int) -> StepArrays:
    plan = manager.reserve(ids(*seq_ids), ids(*(1 for _ in seq_ids)))
    assert plan is not None
    arrays = device.run(plan)
    manager.commit(plan)
    return arrays


@SMALL
def test_steps_of_all_kinds_between_decode_steps(geometry: BlockGeometry) -> None:
    """Prompts, rolled back steps, sequences that end and forks change tables behind the device."""
    generator = random.Random(geometry.block_size * 10 + geometry.open_block_size)
    manager = manager_of(geometry, num_blocks=1000, max_model_len=120)
    device = Device(manager)
    num_seals = 0
    for turn in range(120):
        living = manager.living_seq_ids.tolist()
        if len(living) < 3 or (turn % 9 == 8 and len(living) < 4):
            shared = living and turn % 2
            manager.fork(generator.choice(living)) if shared else manager.add_sequence()
            living = manager.living_seq_ids.tolist()
        lengths = manager.num_computed_tokens
        for seq_id in living:
            if lengths[seq_id] >= 110:
                manager.remove_sequence(seq_id)
        chosen = [n for n in manager.living_seq_ids.tolist() if generator.random() < 0.8]
        counts = [generator.choice([1, 1, 5, 9]) if turn % 5 == 4 else 1 for _ in chosen]
        plan = manager.reserve(ids(*chosen), ids(*counts))
        assert plan is not None
        arrays = device.run(plan)
        num_seals += len(arrays.seal_block_ids)
        if turn % 11 == 10:
            manager.rollback(plan)
        else:
            manager.commit(plan)
    assert num_seals or not geometry.seals


@REAL
def test_a_block_is_sealed_by_one_token(geometry: BlockGeometry) -> None:
    manager = manager_of(geometry, max_model_len=400)
    device = Device(manager)
    first, second = manager.add_sequence(), manager.add_sequence()
    length = geometry.num_head_tokens + geometry.min_tail_tokens + geometry.block_size
    plan = manager.reserve(ids(first, second), ids(length - 2, 3))
    assert plan is not None
    device.run(plan)
    manager.commit(plan)
    seals = [len(decode(manager, device, second, first).seal_block_ids) for _ in range(4)]
    assert seals == [0, int(geometry.seals), 0, 0]


def test_a_windowed_sequence_evicts_between_two_steps() -> None:
    geometry = BlockGeometry(block_size=16, open_block_size=4, num_head_tokens=4, min_tail_tokens=4)
    manager = manager_of(geometry, num_blocks=1000)
    device = Device(manager)
    window = SinkWindow(num_sink_tokens=4, window_size=20)
    chain = TokenChain(ids(), root=b"", sink_window=window)
    windowed, plain = manager.add_sequence(chain), manager.add_sequence()
    for _ in range(90):
        decode(manager, device, plain, windowed)
    (batch,) = {kind: batch for kind, batch in device.batches.items() if not kind.seals}.values()
    step = batch.step.plan.step
    assert step.window_sizes is not None
    assert step.num_sink_tokens is not None
    assert step.window_sizes.tolist() == [NO_WINDOW, 20, NO_WINDOW]
    assert step.num_sink_tokens.tolist() == [0, 4, 0]
    assert int(manager.num_evicted_tokens[windowed]) > 0


def test_what_no_table_holds_is_left_to_other_steps() -> None:
    geometry = BlockGeometry(block_size=16, open_block_size=4, num_head_tokens=0, min_tail_tokens=0)
    manager = manager_of(geometry, num_blocks=1000, max_model_len=100)
    seq_id = manager.add_sequence()
    narrow = DecodeTables(geometry, CPU, max_num_seqs=1, max_model_len=8)
    held = []
    for count in (2, 1, 5, 1):
        plan = manager.reserve(ids(seq_id), ids(count))
        assert plan is not None
        held.append(narrow.holds(plan))
        manager.commit(plan)
    assert held == [False, True, False, False]


def test_changes_that_did_not_arrive_are_told_again() -> None:
    geometry = BlockGeometry(block_size=4, open_block_size=4, num_head_tokens=0, min_tail_tokens=0)
    manager = manager_of(geometry)
    device = Device(manager)
    seq_id = manager.add_sequence()
    plan = manager.reserve(ids(seq_id), ids(9))
    assert plan is not None
    device.replica.apply(plan)
    first = device.replica.changes()
    manager.commit(plan)
    plan = manager.reserve(ids(seq_id), ids(1))
    assert plan is not None
    device.replica.apply(plan)
    rows, places, block_ids = device.replica.changes()
    assert len(first[0]) == len(rows) - len(plan.table_update.seq_ids) > 0
    assert set(zip(first[0].tolist(), first[1].tolist(), strict=True)) <= set(
        zip(rows.tolist(), places.tolist(), strict=True)
    )
    device.replica.forget_changes()
    assert [len(part) for part in device.replica.changes()] == [0, 0, 0]
    assert block_ids.dtype == np.int32
