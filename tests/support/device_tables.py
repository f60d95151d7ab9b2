"""Block tables on a device that learns changes alone, and decode steps made of them there.

Each step is held to the arrays of its plan; what it writes is poisoned before.
"""

from __future__ import annotations

import numpy as np
import torch

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.table_replica import TableReplica
from paged_kv.cache.decode_tables import BatchKind, DecodeBatch, DecodeTables, Drawn
from tests.support.arrays import ids
from tests.support.plan_reader import slot_mapping

POISON = 1 << 40


def tables_of(manager: BlockManager) -> DecodeTables:
    sizes = {"max_num_seqs": manager.max_num_seqs, "max_model_len": manager.max_model_len}
    return DecodeTables(manager.geometry, torch.device("cpu"), **sizes)


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


def decode_across_a_seal() -> int:
    """Six steps of two sequences, of which one seals a block; how many do."""
    geometry = BlockGeometry(
        block_size=128, open_block_size=16, num_head_tokens=16, min_tail_tokens=0
    )
    manager = BlockManager(geometry, num_blocks=100, max_num_seqs=4, max_model_len=400)
    device = Device(manager)
    first, second = manager.add_sequence(), manager.add_sequence()
    plan = manager.reserve(ids(first, second), ids(16 + 128 - 3, 30))
    assert plan is not None
    device.run(plan)
    manager.commit(plan)
    return sum(len(decode(manager, device, second, first).seal_block_ids) for _ in range(6))
