"""Plans as the runner of a model reads them: through a replica of the tables, never the manager."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry, IntArray
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.table_replica import TableReplica


class PlanReader:
    """Makes the arrays of every plan of one manager, in order."""

    def __init__(self, geometry: BlockGeometry) -> None:
        self.geometry = geometry
        self.replica = TableReplica(geometry)

    def read(self, plan: StepPlan) -> StepArrays:
        self.replica.apply(plan)
        return StepArrays.from_plan(self.geometry, plan, self.replica)


_readers: WeakKeyDictionary[BlockManager, PlanReader] = WeakKeyDictionary()
_arrays: WeakKeyDictionary[StepPlan, StepArrays] = WeakKeyDictionary()


def arrays_of(manager: BlockManager, plan: StepPlan) -> StepArrays:
    """The arrays of a plan, made when first asked for: of each plan of a manager, in order."""
    if plan not in _arrays:
        reader = _readers.setdefault(manager, PlanReader(manager.geometry))
        _arrays[plan] = reader.read(plan)
    return _arrays[plan]


def slot_mapping(arrays: StepArrays) -> IntArray:
    """[T] the open slot of each new token; -1 where it goes straight into a sealed block."""
    mapping = np.full(len(arrays.cache_positions), -1, dtype=np.int64)
    mapping[arrays.stored_tokens] = arrays.stored_slots
    return mapping


def open_ids(geometry: BlockGeometry, arrays: StepArrays, row: int) -> list[int]:
    """Open blocks of a sequence's context, head and tail, as its table names them."""
    num_places = geometry.table_width(int(arrays.context_lens[row]))
    body_end = geometry.num_head_blocks
    body_end += int(arrays.num_sealed[row]) * geometry.open_blocks_per_block
    places = [*range(min(geometry.num_head_blocks, num_places)), *range(body_end, num_places)]
    return arrays.block_table[row, places].tolist()


def sealed_ids(geometry: BlockGeometry, arrays: StepArrays, row: int) -> list[int]:
    """Sealed blocks of a sequence's context, as its table names them."""
    body = np.arange(arrays.num_sealed[row]) * geometry.open_blocks_per_block
    return arrays.block_table[row, geometry.num_head_blocks + body].tolist()
